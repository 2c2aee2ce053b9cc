#pragma once

#include <cstdint>

#include "core/batch.h"

namespace tether {

// ---- group-relative advantages -----------------------------------------------------------------
//
//   A_i = (r_i - mean_g) / (std_g + epsilon),   g the group of i, std with N - 1     group_std
//   A_i = r_i - mean_g                                                               none
//
// Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1.2; without the std: Dr. GRPO,
// arXiv:2503.20783. One reward per sequence; the advantage is shared by its tokens.
//
// Sums are of deviations from the group's first reward, in double: equal rewards give exactly 0,
// where peers give up to 0.8 (their mean of equal floats is not that float). A group of one gives 0
// (verl gives the raw reward).
enum class AdvantageScale { group_std, none };
enum class NanReward { error, missing };

struct GroupAdvantage {
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

struct DiscountedReturns {
  double gamma = 1;  // in [0, 1]
  MaskGap gap = MaskGap::carry;
};

// Rows of rewards [B, T] with weights: a slot of weight 0 is masked, any other is a token. The
// recursion is in double. `bootstrap` is per_row, or absent for 0.
void discounted_returns(const RowLayout& layout, const ConstArray& rewards,
                        const ConstArray& response_mask, const ConstArray& bootstrap,
                        const DiscountedReturns& options, const MutableArray& returns);

}  // namespace tether
