#pragma once

#include <Eigen/Core>
#include <string_view>

#include "../rl/batch_weight_catalogue.h"
#include "../rl/catalogue.h"
#include "../rl/kernels/batch_weights.h"
#include "../rl/kernels/policy_loss.h"
#include "../rl/kernels/preference_loss.h"
#include "../rl/kernels/value_loss.h"
#include "eigen_estimators.h"

// The objectives on Eigen arrays (face/eigen_estimators.h says which): loss, metrics and gradients
// by the fused kernels. Arithmetic is in double if logps (values) are, else in float.
//
//   const tether::eigen::PolicyResult out = tether::eigen::policy_loss(
//       {.logps = logps, .advantages = advantages, .response_mask = mask, .old_logps = old_logps},
//       tether::presets::ppo());

namespace tether::eigen {

// [B, T] each (rl/kernels/arrays.h says what), advantages [B, T] or [B, 1]; {} is absent.
using PolicyBatch = PolicyInputs<Tokens>;

struct PolicyResult {
  double loss;
  PolicyMetrics metrics;
  Eigen::ArrayXXd dlogps;
  Eigen::ArrayXXd dentropies;  // empty without entropies
};

inline PolicyResult policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                                const Normalizer& normalizer = {}) {
  const PolicyArrays arrays = detail::arrays_of("policy_loss", batch);
  PolicyResult out{0, {}, detail::new_like(batch.logps), {}};
  PolicyGradients gradients{.logps = detail::output(out.dlogps)};
  if (batch.entropies.defined()) {
    out.dentropies = detail::new_like(batch.logps);
    gradients.entropies = detail::output(out.dentropies);
  }
  const PolicyTotals totals = tether::policy_loss(arrays, objective, normalizer, gradients);
  out.loss = totals.loss;
  out.metrics = totals.metrics;
  return out;
}

// What the caller adds up over the micro-batches and ranks of an optimizer step.
inline Normalizer local_counts(const PolicyBatch& batch, const PolicyObjective& objective) {
  return tether::local_counts(detail::arrays_of("local_counts", batch), objective);
}

// Weights of tokens that need the whole batch, 1 in masked slots (rl/batch_weight_catalogue.h).
inline Eigen::ArrayXXd batch_weights(const BatchWeightInputs<Tokens>& batch,
                                     const BatchWeight& rule) {
  const BatchWeightArrays arrays = detail::arrays_of("batch_weights", batch);
  Eigen::ArrayXXd out = detail::new_like(batch.logps);
  tether::batch_weights("batch_weights", arrays, rule, detail::output(out));
  return out;
}

// Chosen answers first, then the rejected ones: [2 B, T].
using PreferenceBatch = PreferenceInputs<Tokens>;

struct PreferenceResult {
  double loss;
  PreferenceMetrics metrics;
  Eigen::ArrayXXd dlogps;
};

inline PreferenceResult preference_loss(const PreferenceBatch& batch,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer = {}) {
  const PreferenceArrays arrays = detail::arrays_of("preference_loss", batch);
  PreferenceResult out{0, {}, detail::new_like(batch.logps)};
  const PreferenceTotals totals =
      tether::preference_loss(arrays, objective, normalizer, detail::output(out.dlogps));
  out.loss = totals.loss;
  out.metrics = totals.metrics;
  return out;
}

// [B, T] each.
using ValueBatch = ValueInputs<Tokens>;

struct ValueResult {
  double loss;
  ValueMetrics metrics;
  Eigen::ArrayXXd dvalues;
};

inline ValueResult value_loss(const ValueBatch& batch, const ValueObjective& objective = {},
                              const Normalizer& normalizer = {}) {
  const ValueArrays arrays = detail::arrays_of("value_loss", batch);
  ValueResult out{0, {}, detail::new_like(batch.values)};
  const ValueTotals totals =
      tether::value_loss(arrays, objective, normalizer, detail::output(out.dvalues));
  out.loss = totals.loss;
  out.metrics = totals.metrics;
  return out;
}

}  // namespace tether::eigen
