#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "../core/fields.h"
#include "../core/number.h"
#include "../estimators/kl/forms.h"

namespace tether {

// Those that a penalty may be made of.
inline constexpr std::array<std::string_view, 3> kPenaltyEstimatorNames{"k1", "k2", "k3"};

enum class KlCorrection { none, ratio, detached_ratio, level_ratio, detached_level_ratio };
inline constexpr std::array<std::string_view, 5> kKlCorrectionNames{
    "none", "ratio", "detached_ratio", "level_ratio", "detached_level_ratio"};

// Whether the ratio that weighs the penalty is that of the objective's level (rl/level.h).
TETHER_INLINE constexpr bool of_level(KlCorrection correction) {
  return correction == KlCorrection::level_ratio ||
         correction == KlCorrection::detached_level_ratio;
}

// Whether the gradient flows through the ratio too.
TETHER_INLINE constexpr bool through_ratio(KlCorrection correction) {
  return correction == KlCorrection::ratio || correction == KlCorrection::level_ratio;
}

// The penalty that ties the policy to its reference: beta times, for each token,
//
//   rho K(d),   d = ref_logp - logp,   rho = 1, or a ratio policy / old policy
//
// where the ratio is the token's own, or that of the objective's level: at levels of sequences one
// number for the row, as TRL has it for GSPO (use_bias_correction_kl).
// K is the estimator (estimators/kl/forms.h) of KL(policy || reference); the gradient may be
// another one's, straight through. What the gradient of rho G(d) is, in expectation over the old
// policy's samples (with rho = 1: over the policy's own), where rho is the token's own:
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

// The ratio of a log-ratio, as the weight of a penalty: a constant.
template <class Number>
TETHER_INLINE auto kl_weight(const Number& log_ratio, double weight_bound) {
  return stop_gradient(exp(clamp(log_ratio, -weight_bound, weight_bound)));
}

template <class Number>
TETHER_INLINE Number kl_value(KlEstimator estimator, const Number& log_ratio) {
  switch (estimator) {
    case KlEstimator::k1:
      return k1(log_ratio);
    case KlEstimator::k2:
      return k2(log_ratio);
    case KlEstimator::k3:
    case KlEstimator::k_lambda:
      break;
  }
  return k3(log_ratio);
}

// K + dK / d logp of an estimator, what a ratio in the graph multiplies.
template <class Number>
TETHER_INLINE Number kl_score(KlEstimator estimator, const Number& log_ratio) {
  switch (estimator) {
    case KlEstimator::k1:
      return k1_score(log_ratio);
    case KlEstimator::k2:
      return k2_score(log_ratio);
    case KlEstimator::k3:
    case KlEstimator::k_lambda:
      break;
  }
  return k3_score(log_ratio);
}

// rho K(d) of one token whose log-ratio is its own, with the gradient of rho G(d). `weight_bound`:
// kWeightSaturation.
template <class Number, class Constant>
TETHER_INLINE Number kl_term(const KlPenalty& penalty, const Number& logp, const Number& log_ratio,
                             const Constant& ref_logp, double weight_bound) {
  const Number d = ref_logp - logp;
  const Number value = kl_value(penalty.estimator, d);
  if (penalty.correction == KlCorrection::none) {
    return with_gradient_of(value, kl_value(penalty.gradient, d));
  }
  const auto rho = kl_weight(log_ratio, weight_bound);
  if (through_ratio(penalty.correction)) {
    const auto slope = rho * kl_score(penalty.gradient, stop_gradient(d));
    return with_gradient_of(rho * value, slope * logp);
  }
  return with_gradient_of(rho * value, rho * kl_value(penalty.gradient, d));
}

inline void check_kl_penalty(std::string_view function, const KlPenalty& penalty) {
  const auto name = [](const auto& names, auto value) {
    return std::string(names[static_cast<size_t>(value)]);
  };
  for (const auto& [option, estimator] :
       {std::pair("kl_estimator", penalty.estimator), std::pair("kl_gradient", penalty.gradient)}) {
    require(estimator != KlEstimator::k_lambda, [&] {
      return std::string(function) + ": " + option + " must be k1, k2 or k3, got k_lambda";
    });
  }
  const bool corrected = through_ratio(penalty.correction);
  const bool biased = penalty.gradient == (corrected ? KlEstimator::k2 : KlEstimator::k1);
  require(!biased || penalty.beta == 0 || penalty.allow_biased_gradient, [&] {
    return std::string(function) + ": kl_gradient must be " +
           (corrected ? "k1 or k3" : "k2 or k3") + " with kl_correction " +
           name(kKlCorrectionNames, penalty.correction) + ", got " +
           name(kPenaltyEstimatorNames, penalty.gradient) +
           ", whose gradient is not that of a KL divergence. Choose another one or set "
           "allow_biased_gradient";
  });
}

}  // namespace tether
