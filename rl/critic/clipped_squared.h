#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../value_formula.h"

namespace tether {

// The squared error of a value head, clipped around the values at the start of the step.
//
//   loss = 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)
//
// d loss / d V = V - R, or exactly 0 where the clipped error is the larger one and V is outside of
// the interval. At a tie the unclipped error counts. R is the return that GAE gives
// (estimators/advantage/gae.h). OpenAI baselines, ppo2; clip_range: TRL 0.2, verl 0.5; infinity is
// off.
struct ClippedSquaredError {
  double clip_range = 0.2;

  static constexpr Traits traits{.clips = true};
  static constexpr auto fields() {
    return std::tuple{field("clip_range", &ClippedSquaredError::clip_range, {0, infinity})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const ValueToken<Number>& token) const {
    const Number error = token.value - token.target;
    const Number inside =
        min(max(token.value, token.old_value - clip_range), token.old_value + clip_range);
    const Number clipped = inside - token.target;
    return max(error * error, clipped * clipped) * 0.5;
  }
};

}  // namespace tether
