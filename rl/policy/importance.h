#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// The importance weight of tokens that an engine sampled by other arithmetic than the policy is
// trained with, truncated.
//
//   W = clamp(e^x, low, high),   x = old_logp - rollout_logp
//
// At the level of sequences x is its sum (the ratio of the answers) or its mean (the geometric
// mean of the ratios) over the row. Truncation bounds the variance at the price of a bias.
// Truncated importance sampling: Ionides 2008, doi:10.1198/106186008X320456, eq. 4.
struct TruncatedImportance {
  double low = 0;
  double high = 2;

  static constexpr Traits traits{.needs_rollout_logps = true, .by_sign = true};
  static constexpr auto fields() { return bounds_of_ratio<TruncatedImportance>(); }
  RatioInterval truncation() const { return {low, high}; }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return mismatch(token);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return clamp(exp(x), low, high);
  }
};

// The importance weight within its bounds, and 0 beyond them: what the engine and the trainer see
// too differently has no gradient.
//
//   W = e^x where low <= e^x <= high, else 0
//
// IcePop: arXiv:2510.18855, eq. 2.
struct MaskedImportance {
  double low = 0.5;
  double high = 5;

  static constexpr Traits traits{.needs_rollout_logps = true, .by_sign = true};
  static constexpr auto fields() { return bounds_of_ratio<MaskedImportance>(); }
  RatioInterval truncation() const { return {low, high}; }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return mismatch(token);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    const Number ratio = exp(x);
    return within(ratio, low, high, ratio, 0 * x);
  }
};

}  // namespace tether
