#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../core/number.h"

namespace tether {

// KL divergences in closed form [nats]. The first distribution is the one that is sampled from:
// KL(q || p) = E_q log q / p.

// Categorical, from log-probabilities of `size` outcomes, in Bregman form: every term is >= 0, so
// that nothing cancels where q and p are close.
//
//   KL(q || p) = sum_i q_i (e^d_i - 1 - d_i),   d = log p - log q
//
// where d > 1 as p_i - q_i - q_i d_i, in which nothing cancels or overflows.
//
// Where wanted, its gradients with respect to the logits of q and of p,
//   q_i (-d_i - KL)   and   p_i - q_i.
// An outcome with q_i = 0 adds its p_i (the form stays a divergence of probabilities that sum to
// 1); p_i = 0 < q_i gives infinity. Other direction: swap the arguments.
inline double categorical_kl(const double* log_q, const double* log_p, int64_t size,
                             double* dlogits_q = nullptr, double* dlogits_p = nullptr) {
  double kl = 0;
  const auto term = [&](int64_t i) {
    const double q = std::exp(log_q[i]);
    const double d = log_p[i] - log_q[i];
    if (q == 0) return std::exp(log_p[i]);
    if (std::isinf(d)) return q * std::abs(d);
    if (d > 1) return std::exp(log_p[i]) - q - q * d;
    return q * expm1_minus(Constant<double>{d}).value;
  };
  for (int64_t i = 0; i < size; ++i) kl += term(i);
  for (int64_t i = 0; i < size && dlogits_q; ++i) {
    const double q = std::exp(log_q[i]);
    dlogits_q[i] = q == 0 ? 0 : q * (log_q[i] - log_p[i] - kl);
  }
  for (int64_t i = 0; i < size && dlogits_p; ++i) {
    dlogits_p[i] = std::exp(log_p[i]) - std::exp(log_q[i]);
  }
  return kl;
}

namespace detail {

template <class T>
TETHER_INLINE auto lifted(const T& x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return Constant<T>{x};
  } else {
    return x;
  }
}

// A number without gradient as a plain one, if only such went in.
template <class... Arguments, class Number>
TETHER_INLINE auto lowered(const Number& x) {
  if constexpr ((std::is_arithmetic_v<Arguments> && ...)) {
    return x.value;
  } else {
    return x;
  }
}

}  // namespace detail

// Arguments below are plain numbers or those of core/number.h, in any mixture: what has a gradient
// is the caller's choice.

// Bernoulli, from the logits of the outcome 1, in the same form. Of one token against all others it
// is a lower bound of the categorical divergence (data processing), not an estimate of it.
template <class Q, class P>
TETHER_INLINE auto bernoulli_kl(const Q& logit_q, const P& logit_p) {
  const auto term = [](const auto& at_q, const auto& at_p) {
    const auto q = sigmoid(at_q);
    const auto d = log_sigmoid(at_p) - log_sigmoid(at_q);
    return select(d > 1, sigmoid(at_p) - q - q * d, q * expm1_minus(d));
  };
  const auto q = detail::lifted(logit_q);
  const auto p = detail::lifted(logit_p);
  return detail::lowered<Q, P>(term(q, p) + term(-q, -p));
}

// Gaussian, from means and logarithms of standard deviations, s = log sigma_q - log sigma_p:
//
//   KL(q || p) = ((mean_q - mean_p) / sigma_p)^2 / 2 + (e^2s - 1 - 2s) / 2
//
// d / d mean_q = (mean_q - mean_p) / sigma_p^2, d / d log sigma_q = e^2s - 1.
template <class MeanQ, class StdQ, class MeanP, class StdP>
TETHER_INLINE auto gaussian_kl(const MeanQ& mean_q, const StdQ& log_std_q, const MeanP& mean_p,
                               const StdP& log_std_p) {
  using detail::lifted;
  const auto gap = (lifted(mean_q) - lifted(mean_p)) * exp(-lifted(log_std_p));
  const auto s = lifted(log_std_q) - lifted(log_std_p);
  return detail::lowered<MeanQ, StdQ, MeanP, StdP>((gap * gap + expm1_minus(s * 2)) * 0.5);
}

}  // namespace tether
