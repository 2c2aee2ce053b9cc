#pragma once

#include <array>
#include <string_view>

#include "../../core/number.h"

namespace tether {

// The estimators by name.
enum class KlEstimator { k1, k2, k3, k_lambda };
inline constexpr std::array<std::string_view, 4> kKlEstimatorNames{"k1", "k2", "k3", "k_lambda"};

// One-sample estimators of a KL divergence from log-probabilities.
//
//   x ~ sampled,   d = log_ratio = log other(x) - log sampled(x)                         [nats]
//
// The sampled distribution is the denominator: on-policy, sampled = policy and other = reference,
// and the divergence is KL(policy || reference). Schulman 2020, "Approximating KL divergence",
// joschu.net/blog/kl-approx.html.

//   k1 = -d          unbiased, signed; std / KL ~ sqrt(2 / KL)
// As a loss its gradient has expectation 0: it pulls nowhere.
template <class Number>
TETHER_INLINE Number k1(const Number& log_ratio) {
  return -log_ratio;
}

//   k2 = d^2 / 2     biased, >= 0
// As a loss its gradient is that of KL(sampled || other), sample by sample -d grad log sampled.
template <class Number>
TETHER_INLINE Number k2(const Number& log_ratio) {
  return log_ratio * log_ratio * 0.5;
}

//   k3 = e^d - 1 - d     unbiased where the supports agree, >= 0
// As a loss its gradient is that of KL(other || sampled): (1 - e^d) grad log sampled.
// Evaluated without cancellation (2 ulp) and saturated above d = kSaturation, where peers that
// clamp the result lose the gradient. DeepSeekMath, arXiv:2402.03300, eq. 4.
template <class Number>
TETHER_INLINE Number k3(const Number& log_ratio) {
  return expm1_minus(log_ratio);
}

// The score of an estimator K: K + dK / d log sampled, the derivative of rho K by log sampled over
// rho = sampled / old. In closed form, where the sum would cancel: that of k3 is exactly -d.
template <class Number>
TETHER_INLINE Number k1_score(const Number& log_ratio) {
  return 1 - log_ratio;
}
template <class Number>
TETHER_INLINE Number k2_score(const Number& log_ratio) {
  return log_ratio * (log_ratio * 0.5 - 1);
}
template <class Number>
TETHER_INLINE Number k3_score(const Number& log_ratio) {
  return -log_ratio;
}

//   k_lambda = -d + lambda (e^d - 1)     unbiased for every lambda where the supports agree
// lambda = 0 is k1, lambda = 1 is k3. The variance is least at lambda* = Cov(d, r) / Var r, r =
// e^d, which is J(sampled, other) / chi2(other || sampled); fitted_lambda (report.h) measures
// it.
template <class Number>
TETHER_INLINE Number k_lambda(const Number& log_ratio, double lambda) {
  return expm1(log_ratio) * lambda - log_ratio;
}

}  // namespace tether
