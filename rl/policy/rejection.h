#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// Rejection: tokens, or answers, that the trainer and the engine that sampled them see too
// differently leave the batch. They are counted by no denominator, and no penalty sees them.
//
//   W = 1 where low <= e^x <= high, else 0,   x = old_logp - rollout_logp
//
// At the level of sequences x is its sum or mean over the row; by its smallest with low = 1e-4,
// say, one token that the trainer finds impossible vetoes its answer. verl, rollout_rs with k1,
// whose bounds are of e^-x. No paper states bounds.
struct RatioGate {
  double low = 0.5;
  double high = 2;

  static constexpr Traits traits{.needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bounds_of_ratio<RatioGate>(); }
  RatioInterval truncation() const { return {low, high}; }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return mismatch(token);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    const Number ratio = exp(x);
    return select(ratio < low, 0 * x, select(ratio > high, 0 * x, 0 * x + 1));
  }
};

}  // namespace tether
