#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "../../core/batch.h"
#include "../../core/parallel.h"

namespace tether {

// ---- group-relative advantages -----------------------------------------------------------------
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

// ---- discounted returns ------------------------------------------------------------------------
//
//   G_t = r_t + gamma G_{t+1},   G after the last token = bootstrap
//
// Over a masked gap (tool output, observations) the return is carried: one step passes between the
// tokens around it. With decay, every masked slot between tokens costs a factor gamma; what follows
// the last token is padding. Rewards at masked slots are not looked at; G is 0 there.
enum class MaskGap { carry, decay };
inline constexpr std::array<std::string_view, 2> kMaskGapNames{"carry", "decay"};

struct DiscountedReturns {
  double gamma = 1;  // in [0, 1]
  MaskGap gap = MaskGap::carry;
};

// Rows of rewards [B, T] with weights: a slot of weight 0 is masked, any other is a token. The
// recursion is in double. `bootstrap` is per_row, or absent for 0.
void discounted_returns(const RowLayout& layout, const ConstArray& rewards,
                        const ConstArray& response_mask, const ConstArray& bootstrap,
                        const DiscountedReturns& options, const MutableArray& returns);

// ---- generalized advantage estimation ----------------------------------------------------------
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lambda A_{t+1},     return_t = A_t + V_t
//
// Schulman et al. 2015, arXiv:1506.02438, eq. 16. After the last token V is `bootstrap` and A is 0.
// At a token that is `done`, the episode ends: V_{t+1} = A_{t+1} = 0. At one that is `truncated`,
// it is cut off, not over: A_{t+1} = 0 and V_{t+1} is its `truncation_values`.
//
// Over a masked gap nothing passes: one step lies between the tokens around it (verl, NeMo-RL).
// With decay every masked slot between tokens is a step without reward, V = gamma V_{t+1} and A =
// gamma lambda A_{t+1}. What follows the last token is padding. Masked slots are not looked at and
// come out as 0.
struct Gae {
  double gamma = 1;   // in [0, 1]
  double lambda = 1;  // in [0, 1]; Schulman et al. 2017: 0.95
  MaskGap gap = MaskGap::carry;
};

// Rows [B, T]; absent arrays are 0, and `lambdas`, per_row or per token, goes before
// options.lambda. Fractional weights count as tokens.
struct GaeArrays {
  RowLayout layout;
  ConstArray rewards, values, response_mask;
  ConstArray bootstrap = {};             // per_row
  ConstArray done = {}, truncated = {};  // not 0: true
  ConstArray truncation_values = {};     // needed with truncated
  ConstArray lambdas = {};               // VAPO's length-adaptive lambda, arXiv:2504.05118
};

// Recursions are in double; the same bits for every executor.
void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor = {});

}  // namespace tether
