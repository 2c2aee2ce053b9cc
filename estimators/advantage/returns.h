#pragma once

#include <array>
#include <string_view>

#include "../../core/batch.h"

namespace tether {

// Discounted returns.
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

}  // namespace tether
