#pragma once

#include "../../core/number.h"

namespace tether {

// One-sample estimators of a KL divergence from log-probabilities.
//
//   x ~ sampled,   d = log_ratio = log other(x) - log sampled(x)                         [nats]
//
// The sampled distribution is the denominator: on-policy, sampled = policy and other = reference,
// and the divergence is KL(policy || reference). Schulman 2020, "Approximating KL divergence",
// joschu.net/blog/kl-approx.html.

// Two things may be followed, by log sampled: the slope dK, and the score K + dK, which is the
// derivative of rho K over rho = sampled / old (Williams 1992). A form states the score where the
// sum would cancel.

// A divergence between the two: of what the mean of a form is an unbiased estimate, or what its
// slope or score is the gradient of, in the mean over x ~ sampled.
enum class KlDirection {
  none,
  reverse,  // KL(sampled || other)
  forward   // KL(other || sampled)
};
struct KlLabels {
  KlDirection value = KlDirection::none;
  KlDirection slope = KlDirection::none;
  KlDirection score = KlDirection::none;
};

//   k1 = -d          unbiased, signed; std / KL ~ sqrt(2 / KL)
// As a loss its gradient has expectation 0: it pulls nowhere.
template <class Number>
TETHER_INLINE Number k1(const Number& log_ratio) {
  return -log_ratio;
}
struct K1 {
  static constexpr KlLabels labels{.value = KlDirection::reverse, .score = KlDirection::reverse};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return k1(d);
  }
  template <class Constant>
  TETHER_FORMULA Constant score(const Constant& d) const {
    return 1 - d;
  }
};

//   k2 = d^2 / 2     biased, >= 0
// As a loss its gradient is that of KL(sampled || other), sample by sample -d grad log sampled.
template <class Number>
TETHER_INLINE Number k2(const Number& log_ratio) {
  return log_ratio * log_ratio * 0.5;
}
struct K2 {
  static constexpr KlLabels labels{.slope = KlDirection::reverse};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return k2(d);
  }
  template <class Constant>
  TETHER_FORMULA Constant score(const Constant& d) const {
    return d * (d * 0.5 - 1);
  }
};

//   k3 = e^d - 1 - d     unbiased where the supports agree, >= 0
// As a loss its gradient is that of KL(other || sampled): (1 - e^d) grad log sampled. Its score is
// exactly -d.
// Evaluated without cancellation (2 ulp) and saturated above d = kSaturation, where peers that
// clamp the result lose the gradient. DeepSeekMath, arXiv:2402.03300, eq. 4.
template <class Number>
TETHER_INLINE Number k3(const Number& log_ratio) {
  return expm1_minus(log_ratio);
}
struct K3 {
  static constexpr KlLabels labels{
      .value = KlDirection::reverse, .slope = KlDirection::forward, .score = KlDirection::reverse};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return k3(d);
  }
  template <class Constant>
  TETHER_FORMULA Constant score(const Constant& d) const {
    return -d;
  }
};

//   low_var_kl = min(e^d - 1 - d, 10)     k3 up to a bound, beyond d = 2.61 and below d = -11
// Beyond, value and gradient are the bound's: what has moved far from the reference is no longer
// pulled back. Its labels are those of k3, where no sample is that far. verl, slime; OpenRLHF's k3.
struct LowVarKl {
  static constexpr KlLabels labels = K3::labels;
  static constexpr double bound = 10;

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return min(k3(d), bound);
  }
  template <class Constant>
  TETHER_FORMULA Constant score(const Constant& d) const {
    return select(k3(d) > bound, min(k3(d), bound), -d);
  }
};

//   abs = |d|     biased, >= 0
// As a loss its gradient is of no KL: sign(log sampled - log other) grad log sampled is that of the
// sum over x of |sampled - other|, twice the total variation. verl's "abs".
struct KlAbs {
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return abs(d);
  }
};

//   k_lambda = -d + lambda (e^d - 1)     unbiased for every lambda where the supports agree
// lambda = 0 is k1, lambda = 1 is k3. The variance is least at lambda* = Cov(d, r) / Var r, r =
// e^d, which is J(sampled, other) / chi2(other || sampled); fitted_lambda (report.h) measures
// it.
template <class Number>
TETHER_INLINE Number k_lambda(const Number& log_ratio, double lambda) {
  return expm1(log_ratio) * lambda - log_ratio;
}

}  // namespace tether
