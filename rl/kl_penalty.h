#pragma once

#include <array>
#include <string>
#include <string_view>

#include "core/fields.h"
#include "core/number.h"
#include "estimators/kl.h"

namespace tether {

enum class KlEstimator { k1, k2, k3 };
inline constexpr std::array<std::string_view, 3> kKlEstimatorNames{"k1", "k2", "k3"};

enum class KlCorrection { none, ratio, detached_ratio };
inline constexpr std::array<std::string_view, 3> kKlCorrectionNames{"none", "ratio",
                                                                    "detached_ratio"};

// The penalty that ties the policy to its reference: beta times, for each token,
//
//   rho K(d),   d = ref_logp - logp,   rho = 1, or the token's ratio policy / old policy
//
// K is the estimator (estimators/kl.h) of KL(policy || reference); the gradient may be another
// one's, straight through. What the gradient of rho G(d) is, in expectation over the old policy's
// samples (with rho = 1: over the policy's own):
//
//   gradient \ correction   none                  ratio                 detached_ratio
//   k1                      0, pure noise         KL(policy || ref)     0, pure noise
//   k2                      KL(policy || ref)     not of a KL           KL(policy || ref)
//   k3                      KL(ref || policy)     KL(policy || ref)     KL(ref || policy)
//
// GRPO: k3, none (arXiv:2402.03300, eq. 4). DeepSeek-V3.2: k3, ratio (arXiv:2512.02556, eq. 7),
// unbiased in value and gradient on- and off-policy. The three that follow no KL divergence are
// refused unless allow_biased_gradient.
struct KlPenalty {
  double beta = 0;  // 0: none, and no reference is needed
  KlEstimator estimator = KlEstimator::k3;
  KlEstimator gradient = KlEstimator::k3;
  KlCorrection correction = KlCorrection::none;
  bool allow_biased_gradient = false;
};

// A ratio beyond e^20 (float64: e^100) weighs as this one: rho e^60 must stay finite.
template <class T>
inline constexpr double kWeightSaturation = 100;
template <>
inline constexpr double kWeightSaturation<float> = 20;

template <class Number>
TETHER_INLINE Number kl_estimate(KlEstimator estimator, const Number& log_ratio) {
  switch (estimator) {
    case KlEstimator::k1:
      return k1(log_ratio);
    case KlEstimator::k2:
      return k2(log_ratio);
    case KlEstimator::k3:
      break;
  }
  return k3(log_ratio);
}

// rho K(d) of one token, with the gradient of rho G(d). `weight_bound`: kWeightSaturation.
template <class Number, class Constant>
TETHER_INLINE Number kl_term(const KlPenalty& penalty, const Number& logp, const Number& log_ratio,
                             const Constant& ref_logp, double weight_bound) {
  const Number d = ref_logp - logp;
  const Number value = kl_estimate(penalty.estimator, d);
  const Number source = kl_estimate(penalty.gradient, d);
  if (penalty.correction == KlCorrection::none) return with_gradient_of(value, source);
  const Number bounded = clamp(log_ratio, -weight_bound, weight_bound);
  const Number rho = exp(with_gradient_of(bounded, log_ratio));
  if (penalty.correction == KlCorrection::ratio) {
    return with_gradient_of(rho * value, rho * source);
  }
  return with_gradient_of(rho * value, stop_gradient(rho) * source);
}

inline void check_kl_penalty(std::string_view function, const KlPenalty& penalty) {
  const auto name = [](const auto& names, auto value) {
    return std::string(names[static_cast<size_t>(value)]);
  };
  const bool corrected = penalty.correction == KlCorrection::ratio;
  const bool biased = penalty.gradient == (corrected ? KlEstimator::k2 : KlEstimator::k1);
  require(!biased || penalty.beta == 0 || penalty.allow_biased_gradient, [&] {
    return std::string(function) + ": kl_gradient must be " +
           (corrected ? "k1 or k3" : "k2 or k3") + " with kl_correction " +
           name(kKlCorrectionNames, penalty.correction) + ", got " +
           name(kKlEstimatorNames, penalty.gradient) +
           ", whose gradient is not that of a KL divergence. Choose another one or set "
           "allow_biased_gradient";
  });
}

}  // namespace tether
