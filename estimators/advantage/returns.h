#pragma once

#include <array>
#include <tuple>

#include "../../core/options.h"
#include "recursion.h"

namespace tether {

// Discounted returns.
//
//   G_t = r_t + gamma G_{t+1},   G after the last token = bootstrap
//
// recursion.h says how rows end and what a masked gap does. Values are not looked at.
struct DiscountedReturns {
  double gamma = 1;
  MaskGap gap = MaskGap::carry;

  static constexpr auto fields() {
    return std::tuple{field("gamma", &DiscountedReturns::gamma, {0, 1})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("gap", &DiscountedReturns::gap, kMaskGapNames)};
  }

  template <class Number>
  TETHER_FORMULA Step<Number> step(const RecursionToken<Number>& token) const {
    return {token.reward, Number{gamma}, Number{gamma}};
  }
};

// Rows [B, T], or packed [N].
template <class Array>
struct ReturnsInputs {
  LayoutOf<Array> layout = {};
  Array rewards = {};
  Array response_mask = {};  // a slot of weight 0 is masked, any other is a token
  Array bootstrap = {};      // [B]; absent: 0
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = ReturnsInputs;
    using A = Argument<In, Array>;
    return std::array{
        A{"rewards", &In::rewards, Shape::rows},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"bootstrap", &In::bootstrap, Shape::per_row, Kind::floating, Use::optional}};
  }
};
using ReturnsArrays = ReturnsInputs<ConstArray>;

// The recursion is in double.
void discounted_returns(const ReturnsArrays& batch, const DiscountedReturns& options,
                        const MutableArray& returns);

}  // namespace tether
