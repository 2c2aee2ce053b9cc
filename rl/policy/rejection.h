#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../../estimators/kl/forms.h"
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
    return within(exp(x), low, high, 0 * x + 1, 0 * x);
  }
};

// By an estimate of the KL divergence between engine and trainer, which both sides enlarge.
//
//   W = 1 where x <= high, else 0,   x = q^2 / 2,   q = old_logp - rollout_logp
//
// verl, rollout_rs with k2.
struct K2Gate {
  double high = 0.5;

  static constexpr Traits traits{.needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bound_from_above<K2Gate>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return k2(mismatch(token));
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

// By k3 of KL(engine || trainer).
//
//   W = 1 where x <= high, else 0,   x = e^q - 1 - q,   q = old_logp - rollout_logp
//
// At the level of sequence_mean it is the estimate for the answer. verl, rollout_rs with k3.
struct K3Gate {
  double high = 0.5;

  static constexpr Traits traits{.needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bound_from_above<K3Gate>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return k3(mismatch(token));
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

// By how far apart the probabilities are.
//
//   W = 1 where x <= high, else 0,   x = |e^old_logp - e^rollout_logp|
//
// ROLL and OpenRLHF, gate by total variation.
struct TvGate {
  double high = 0.2;

  static constexpr Traits traits{
      .of_log_ratio = false, .needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bound_from_above<TvGate>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return abs(exp(token.old_logp) - exp(token.rollout_logp));
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

// By the KL divergence of the two as each sees this token or another one.
//
//   W = 1 where x <= high, else 0,   x = KL(Bernoulli(e^rollout_logp) || Bernoulli(e^old_logp))
//
// OpenRLHF, gate by binary KL.
struct BinaryKlGate {
  double high = 0.05;

  static constexpr Traits traits{
      .of_log_ratio = false, .needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bound_from_above<BinaryKlGate>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return bernoulli_kl(token.rollout_logp, token.old_logp);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

// By the total variation that the ratios of an answer estimate.
//
//   W = 1 where x <= high, else 0,   x = mean over the answer of |min(e^q, 2) - 1|
//
// open-instruct, gate of sequences by total variation.
struct RatioTvGate {
  double high = 0.2;

  static constexpr WeightLevel level = WeightLevel::sequence_mean;
  static constexpr Traits traits{.needs_rollout_logps = true, .leaves = true};
  static constexpr auto fields() { return bound_from_above<RatioTvGate>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return abs(min(exp(mismatch(token)), 2.0) - 1);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

}  // namespace tether
