#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/macros.h"
#include "../token_weight.h"

// What weights share that look at how differently the trainer and the engine that sampled see a
// token.

namespace tether {

// x = old_logp - rollout_logp: log of the importance ratio.
template <class Number>
TETHER_INLINE Number mismatch(const WeightToken<Number>& token) {
  return token.old_logp - token.rollout_logp;
}

// Members low and high, between which the ratio is taken as it is.
template <class Weight>
constexpr auto bounds_of_ratio() {
  return std::tuple{field("low", &Weight::low, {0, largest_finite}),
                    field("high", &Weight::high, {0, infinity, true})};
}

}  // namespace tether
