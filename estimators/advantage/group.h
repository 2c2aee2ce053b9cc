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
//   A_i = (r_i - b_i) / (s + epsilon),   g the group of i
//
//   baseline  mean            b_i = mean of g                               GRPO
//             leave_one_out   b_i = mean of g without i                     RLOO
//             best_of_others  r_i - b_i = max of g - max of g without i     pass@k of the group
//             none            b_i = 0                                       REINFORCE
//   scale     group_std       s = std of g, with N - 1                      GRPO
//             batch_std       s = std of all rewards, with N - 1            arXiv:2508.08221
//             group_mean      s = mean of g; A = 0 where it is not above 0  MaxRL
//             none            no division                                   Dr. GRPO, RLOO
//
// GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Dr. GRPO: arXiv:2503.20783. RLOO:
// Ahmadian et al. 2024, arXiv:2402.14740, eq. 6. Pass@k, what an answer adds to the best of its
// group: Tang et al. 2025, arXiv:2503.19595. MaxRL: Tajwar et al. 2026, arXiv:2602.02710, where
// rewards are at least 0.
//
// Equal rewards give exactly 0 with a baseline, where peers give up to 0.8 (their mean of equal
// floats is not that float), and so does a group of one (verl gives the raw reward).
enum class AdvantageBaseline { mean, leave_one_out, none, best_of_others };
enum class AdvantageScale { group_std, batch_std, none, group_mean };
inline constexpr std::array<std::string_view, 4> kAdvantageBaselineNames{"mean", "leave_one_out",
                                                                         "none", "best_of_others"};
inline constexpr std::array<std::string_view, 4> kAdvantageScaleNames{"group_std", "batch_std",
                                                                      "none", "group_mean"};

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
  TETHER_FORMULA bool reads_best() const { return baseline == AdvantageBaseline::best_of_others; }
  template <class Group>
  TETHER_FORMULA typename Group::Number operator()(const Group& group, int64_t i) const {
    using Number = typename Group::Number;
    Number size = (reads_batch() ? group.batch_std : group.std) + epsilon;
    if (scale == AdvantageScale::group_mean) {
      const Number mean = group.first + group.mean;
      size = mean <= 0 ? 0 : mean + epsilon;
    }
    Number factor = scale == AdvantageScale::none ? 1 : size == 0 ? 0 : 1 / size;
    if (baseline == AdvantageBaseline::none) return group.reward[i] * factor;
    if (reads_best()) {
      const Number lead = group.deviation(i) - group.best_of_others(i);
      return lead < 0 ? 0 : lead * factor;
    }
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
