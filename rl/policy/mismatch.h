#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/macros.h"
#include "../../core/number.h"
#include "../token_weight.h"

// What weights share that look at how differently two policies see a token, or the trainer and the
// engine that sampled it.

namespace tether {

// x = old_logp - rollout_logp: log of the importance ratio.
template <class Number>
TETHER_INLINE Number mismatch(const WeightToken<Number>& token) {
  return token.old_logp - token.rollout_logp;
}

// KL(Bernoulli(p) || Bernoulli(q)) from log p and log q: of a token against all others. A chance
// above 1 by rounding counts as 1; 1e-8 is added to those of the others, so that at 1 it is finite,
// as the authors of DPPO have it.
template <class Number>
TETHER_INLINE Number bernoulli_kl(const Number& log_p, const Number& log_q) {
  const Number a = min(log_p, 0.0), b = min(log_q, 0.0);
  const Number other_p = chances(a).others, other_q = chances(b).others;
  return (1 - other_p) * (a - b) + other_p * log_quotient(other_p + 1e-8, other_q + 1e-8);
}

// `inside` where low <= ratio <= high, else `outside`.
template <class Number>
TETHER_INLINE Number within(const Number& ratio, double low, double high, const Number& inside,
                            const Number& outside) {
  return select(ratio < low, outside, select(ratio > high, outside, inside));
}

// 1 where the statistic is at most `high`, else 0.
template <class Number>
TETHER_INLINE Number one_up_to(const Number& x, double high) {
  return select(x > high, 0 * x, 0 * x + 1);
}

// e^x, and 0 where a float's exp() would no longer fall (core/number.h).
template <class Number>
TETHER_INLINE Number exp_or_zero(const Number& x) {
  return select(x < -double(kSaturation<float>), 0 * x, exp(x));
}

// Member high, up to which a statistic is let through.
template <class Weight>
constexpr auto bound_from_above() {
  return std::tuple{field("high", &Weight::high, {0, infinity})};
}

// Members low and high, between which the ratio is taken as it is.
template <class Weight>
constexpr auto bounds_of_ratio() {
  return std::tuple{field("low", &Weight::low, {0, largest_option}),
                    field("high", &Weight::high, {0, infinity, true})};
}

}  // namespace tether
