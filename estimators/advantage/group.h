#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "../../core/arguments.h"
#include "../../core/options.h"

namespace tether {

// Advantages relative to a group.
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
// Ahmadian et al. 2024, arXiv:2402.14740, eq. 6. One reward per sequence; its tokens share the
// advantage.
//
// Sums are of deviations from the first reward, in long double: equal rewards give exactly 0, where
// peers give up to 0.8 (their mean of equal floats is not that float). A group of one gives 0 with
// a baseline (verl gives the raw reward). A standard deviation of 0 gives 0 with a baseline.
enum class AdvantageBaseline { mean, leave_one_out, none };
enum class AdvantageScale { group_std, batch_std, none };
enum class NanReward { error, missing };
inline constexpr std::array<std::string_view, 3> kAdvantageBaselineNames{"mean", "leave_one_out",
                                                                         "none"};
inline constexpr std::array<std::string_view, 3> kAdvantageScaleNames{"group_std", "batch_std",
                                                                      "none"};
inline constexpr std::array<std::string_view, 2> kNanRewardNames{"error", "missing"};

struct GroupAdvantage {
  AdvantageBaseline baseline = AdvantageBaseline::mean;
  AdvantageScale scale = AdvantageScale::group_std;
  double epsilon = 1e-6;                    // at least 0; TRL has 1e-4
  NanReward nan_reward = NanReward::error;  // missing: 0, and the group is as if it were absent

  static constexpr auto fields() {
    return std::tuple{field("epsilon", &GroupAdvantage::epsilon, {0, largest_finite})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("baseline", &GroupAdvantage::baseline, kAdvantageBaselineNames),
                      choice("scale", &GroupAdvantage::scale, kAdvantageScaleNames),
                      choice("nan_reward", &GroupAdvantage::nan_reward, kNanRewardNames)};
  }
};

// One reward per sequence, and the group of each unless groups are of one size.
template <class Array>
struct GroupInputs {
  LayoutOf<Array> layout = {};
  Array rewards = {};    // [B]
  Array group_ids = {};  // like rewards

  static constexpr auto arguments() {
    using In = GroupInputs;
    using A = Argument<In, Array>;
    return std::array{A{"rewards", &In::rewards, Shape::answers},
                      A{"group_ids", &In::group_ids, Shape::tokens, Kind::ids, Use::optional}};
  }
};

// Groups of `group_size` consecutive rewards; `count` must be a multiple of it. T is float or
// double.
template <class T>
void group_advantage(const T* rewards, int64_t count, int64_t group_size,
                     const GroupAdvantage& options, T* advantages);

// Groups by id: any ids, in any order, groups of any size.
template <class T>
void group_advantage(const T* rewards, const int64_t* group_ids, int64_t count,
                     const GroupAdvantage& options, T* advantages);

}  // namespace tether
