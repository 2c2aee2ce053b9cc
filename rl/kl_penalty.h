#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <string_view>

#include "../core/fields.h"
#include "../core/number.h"
#include "../estimators/kl/catalogue.h"

namespace tether {

enum class KlCorrection {
  none,
  ratio,
  detached_ratio,
  level_ratio,
  detached_level_ratio,
  on_policy,
  rollout_ratio,
  detached_rollout_ratio
};
inline constexpr std::array<std::string_view, 8> kKlCorrectionNames{
    "none",      "ratio",         "detached_ratio",        "level_ratio", "detached_level_ratio",
    "on_policy", "rollout_ratio", "detached_rollout_ratio"};

// The policy that the penalty ties to.
enum class KlReference { reference, old, rollout };
inline constexpr std::array<std::string_view, 3> kKlReferenceNames{"reference", "old", "rollout"};

// The policy that has sampled the tokens, where a token's own ratio weighs its penalty.
TETHER_INLINE constexpr KlReference sampler_of(KlCorrection correction) {
  return correction == KlCorrection::rollout_ratio ||
                 correction == KlCorrection::detached_rollout_ratio
             ? KlReference::rollout
             : KlReference::old;
}

// Whether the ratio that weighs the penalty is that of the objective's level (rl/level.h).
TETHER_INLINE constexpr bool of_level(KlCorrection correction) {
  return correction == KlCorrection::level_ratio ||
         correction == KlCorrection::detached_level_ratio;
}

// Whether the gradient flows through the ratio too.
TETHER_INLINE constexpr bool through_ratio(KlCorrection correction) {
  return correction == KlCorrection::ratio || correction == KlCorrection::level_ratio ||
         correction == KlCorrection::on_policy || correction == KlCorrection::rollout_ratio;
}

// Whether the ratio is another number than 1.
TETHER_INLINE constexpr bool weighs(KlCorrection correction) {
  return correction != KlCorrection::none && correction != KlCorrection::on_policy;
}

// The penalty that ties the policy to its reference: beta times, for each token,
//
//   rho K(d),   d = ref_logp - logp,   rho = 1, or a ratio policy / sampler
//
// times the caller's weight of the token (kl_weights), where the ratio is the token's own, or that
// of the objective's level: above the level of tokens one number for the segment, as TRL has it for
// GSPO (use_bias_correction_kl). NeMo-RL has two of a token: rollout_ratio, policy / engine (its
// use_on_policy_kl_approximation), and on_policy, which takes the samples for the policy's own:
// rho = e^(logp - sg logp) is 1 and has the gradient of a ratio. K is the estimator of KL(policy ||
// reference), a form of estimators/kl/catalogue.h or a user's own; the gradient may be another
// one's, straight through. The old policy or the engine's may stand for the reference. What the
// gradient of rho G(d) is, in expectation over the samples of the ratio's denominator (with rho =
// 1: over the policy's own), where rho is the token's own:
//
//   gradient \ correction   none                  ratio, on_policy      detached_ratio
//   k1                      0, pure noise         KL(policy || ref)     0, pure noise
//   k2                      KL(policy || ref)     not of a KL           KL(policy || ref)
//   k3                      KL(ref || policy)     KL(policy || ref)     KL(ref || policy)
//
// GRPO: k3, none (arXiv:2402.03300, eq. 4). DeepSeek-V3.2: k3, ratio (arXiv:2512.02556, eq. 7),
// unbiased in value and gradient on- and off-policy. What follows no KL divergence by the labels of
// the form is refused unless allow_biased_gradient: the slope's, with ratio the score's.
struct KlPenalty {
  double beta = 0;  // 0: none, and no reference is needed
  KlForm estimator = K3{};
  KlForm gradient = K3{};
  KlCorrection correction = KlCorrection::none;
  KlReference reference = KlReference::reference;  // whose log-probabilities stand for ref_logp
  double ratio_high = infinity;                    // a larger rho counts as this; OpenRLHF: 10
  bool allow_biased_gradient = false;

  bool needs(KlReference policy) const {
    return beta > 0 && (reference == policy || sampler_of(correction) == policy);
  }
};

// A ratio beyond e^20 (float64: e^100) weighs as this one: rho e^60 must stay finite.
template <class T>
inline constexpr double kWeightSaturation = 100;
template <>
inline constexpr double kWeightSaturation<float> = 20;

// Between which log-ratios it weighs as it is.
struct KlWeightBounds {
  double low, high;
};
inline KlWeightBounds weight_bounds(double saturation, double ratio_high) {
  return {-saturation, std::min(saturation, std::log(ratio_high))};
}

// The ratio of a log-ratio, as the weight of a penalty: a constant.
template <class Number>
TETHER_INLINE auto kl_weight(const Number& log_ratio, const KlWeightBounds& bounds) {
  return stop_gradient(exp(min(max(log_ratio, bounds.low), bounds.high)));
}

// rho K(d) of one token whose log-ratio is its own, with the gradient of rho G(d).
template <class Form, class Source, class Number, class Constant>
TETHER_INLINE Number kl_term(const Form& estimator, const Source& gradient, KlCorrection correction,
                             const Number& logp, const Number& log_ratio, const Constant& ref_logp,
                             const KlWeightBounds& bounds) {
  const Number d = ref_logp - logp;
  const Number value = estimator(d);
  if (correction == KlCorrection::none) return with_gradient_of(value, gradient(d));
  if (correction == KlCorrection::on_policy) {
    return with_gradient_of(value, kl_score(gradient, stop_gradient(d)) * logp);
  }
  const auto rho = kl_weight(log_ratio, bounds);
  if (through_ratio(correction)) {
    const auto slope = rho * kl_score(gradient, stop_gradient(d));
    return with_gradient_of(rho * value, slope * logp);
  }
  return with_gradient_of(rho * value, rho * gradient(d));
}

// Whether the gradient of the penalty is that of a KL divergence.
constexpr bool follows_kl(const KlLabels& labels, KlCorrection correction) {
  return (through_ratio(correction) ? labels.score : labels.slope) != KlDirection::none;
}

inline void check_kl_penalty(std::string_view function, const KlPenalty& penalty) {
  const bool biased = !follows_kl(penalty.gradient.labels(), penalty.correction);
  require(!biased || penalty.beta == 0 || penalty.allow_biased_gradient, [&] {
    std::string others;
    for_each_kl_form([&](const auto& row) {
      if (!follows_kl(KlForm(row.defaults).labels(), penalty.correction)) return;
      others += (others.empty() ? "" : " or ") + std::string(row.name);
    });
    const size_t index = chosen(penalty.gradient);
    return std::string(function) + ": kl_gradient must be " + others + " with kl_correction " +
           std::string(kKlCorrectionNames[static_cast<size_t>(penalty.correction)]) + ", got " +
           (index < kKlFormNames.size() ? std::string(kKlFormNames[index]) : "another type") +
           ", whose gradient is not that of a KL divergence. Choose another one or set "
           "allow_biased_gradient";
  });
}

}  // namespace tether
