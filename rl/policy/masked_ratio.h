#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// The policy's own ratio within bounds, and 0 beyond: CISPO with a mask in place of the clip. SkyRL
// has it against the engine.
//
//   W = ratio where low <= ratio <= high, else 0,   ratio = e^(logp - old_logp)
struct MaskedRatio {
  double low = 0.5;
  double high = 2;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() { return bounds_of_ratio<MaskedRatio>(); }
  RatioInterval truncation() const { return {low, high}; }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.logp - token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    const Number ratio = exp(x);
    return within(ratio, low, high, ratio, 0 * x);
  }
};

}  // namespace tether
