#pragma once

#include <tuple>

#include "../../core/options.h"
#include "group_rule.h"

namespace tether {

// On-policy RL with optimal baseline: the baseline of least variance, if the gradients of tokens
// are orthogonal and of one size.
//
//   A_i = r_i - sum_j L_j r_j / sum_j L_j,   j in the group of i, L its tokens
//
// Hao et al. 2025, arXiv:2505.23585. A group of one gives 0 (verl gives the raw reward); one
// without tokens has the mean of its answers (verl NaN).
struct Opo {
  NanReward nan_reward = NanReward::error;

  static constexpr Traits traits{.needs_lengths = true};
  static constexpr auto choices() {
    return std::tuple{choice("nan_reward", &Opo::nan_reward, kNanRewardNames)};
  }

  template <class Group>
  TETHER_FORMULA typename Group::Number operator()(const Group& group, int64_t i) const {
    return group.deviation(i) - group.length_mean;
  }
};

}  // namespace tether
