#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "../../core/options.h"
#include "group_rule.h"

namespace tether {

// Advantages relative to a group, a baseline and a scale:
//
//   A_i = (r_i - b_i) / (std + epsilon),   g the group of i
//
//   baseline  mean            b_i = mean of g                               GRPO
//             leave_one_out   b_i = mean of g without i                     RLOO
//             none            b_i = 0                                       REINFORCE
//   scale     group_std       std of g, with N - 1                          GRPO
//             batch_std       std of all rewards, with N - 1                arXiv:2508.08221
//             none            no division                                   Dr. GRPO, RLOO
//
// GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Dr. GRPO: arXiv:2503.20783. RLOO:
// Ahmadian et al. 2024, arXiv:2402.14740, eq. 6.
//
// Equal rewards give exactly 0 with a baseline, where peers give up to 0.8 (their mean of equal
// floats is not that float), and so does a group of one (verl gives the raw reward).
enum class AdvantageBaseline { mean, leave_one_out, none };
enum class AdvantageScale { group_std, batch_std, none };
inline constexpr std::array<std::string_view, 3> kAdvantageBaselineNames{"mean", "leave_one_out",
                                                                         "none"};
inline constexpr std::array<std::string_view, 3> kAdvantageScaleNames{"group_std", "batch_std",
                                                                      "none"};

struct GroupAdvantage {
  AdvantageBaseline baseline = AdvantageBaseline::mean;
  AdvantageScale scale = AdvantageScale::group_std;
  double epsilon = 1e-6;  // at least 0; TRL has 1e-4
  NanReward nan_reward = NanReward::error;

  static constexpr auto fields() {
    return std::tuple{field("epsilon", &GroupAdvantage::epsilon, {0, largest_option})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("baseline", &GroupAdvantage::baseline, kAdvantageBaselineNames),
                      choice("scale", &GroupAdvantage::scale, kAdvantageScaleNames),
                      choice("nan_reward", &GroupAdvantage::nan_reward, kNanRewardNames)};
  }

  TETHER_FORMULA bool reads_batch() const { return scale == AdvantageScale::batch_std; }
  template <class Group>
  TETHER_FORMULA typename Group::Number operator()(const Group& group, int64_t i) const {
    using Number = typename Group::Number;
    const Number std = (reads_batch() ? group.batch_std : group.std) + epsilon;
    Number factor = scale == AdvantageScale::none ? 1 : std > 0 ? 1 / std : 0;
    if (baseline == AdvantageBaseline::none) return group.reward[i] * factor;
    const Number n = static_cast<Number>(group.size);
    if (baseline == AdvantageBaseline::leave_one_out) factor *= n > 1 ? n / (n - 1) : 0;
    return (group.deviation(i) - group.mean) * factor;
  }
};

// The rewards of raw memory, in groups of `group_size` or by id (group_rule.h). T is float or
// double.
template <class T>
void group_advantage(const T* rewards, int64_t count, int64_t group_size,
                     const GroupAdvantage& options, T* advantages);
template <class T>
void group_advantage(const T* rewards, const int64_t* group_ids, int64_t count,
                     const GroupAdvantage& options, T* advantages);

}  // namespace tether
