#pragma once

#include <Eigen/Core>
#include <string_view>

#include "eigen_estimators.h"
#include "../rl/catalogue.h"
#include "../rl/kernels/policy_loss.h"
#include "../rl/kernels/preference_loss.h"
#include "../rl/kernels/value_loss.h"

// The objectives on Eigen arrays (face/eigen_estimators.h says which): loss, metrics and gradients by
// the fused kernels. Arithmetic is in double if logps (values) are, else in float.
//
//   const tether::eigen::PolicyResult out = tether::eigen::policy_loss(
//       {.logps = logps, .advantages = advantages, .response_mask = mask, .old_logps = old_logps},
//       tether::presets::ppo());

namespace tether::eigen {

// [B, T] each; {} is absent.
struct PolicyBatch {
  Tokens logps;
  Tokens advantages;     // [B, T], or [B, 1]
  Tokens response_mask;  // weights in [0, 1]; slots of weight 0 may hold anything
  Tokens old_logps = {};
  Tokens ref_logps = {};
  Tokens entropies = {};
};

struct PolicyResult {
  double loss;
  PolicyMetrics metrics;
  Eigen::ArrayXXd dlogps;
  Eigen::ArrayXXd dentropies;  // empty without entropies
};

namespace detail {

inline PolicyArrays arrays_of(std::string_view function, const PolicyBatch& batch) {
  const auto like = [&](std::string_view name, const Tokens& tensor) {
    check_like(function, name, tensor, "logps", batch.logps);
  };
  like("response_mask", batch.response_mask);
  like("old_logps", batch.old_logps);
  like("ref_logps", batch.ref_logps);
  like("entropies", batch.entropies);
  const bool per_row = batch.advantages.columns() == 1 && batch.logps.columns() != 1;
  if (per_row) {
    check_per_row(function, "advantages", batch.advantages, batch.logps.rows());
  } else {
    like("advantages", batch.advantages);
  }
  return {.layout = batch.logps.layout(),
          .logps = batch.logps.array(),
          .advantages = per_row ? batch.advantages.per_row() : batch.advantages.array(),
          .response_mask = batch.response_mask.array(),
          .old_logps = batch.old_logps.array(),
          .ref_logps = batch.ref_logps.array(),
          .entropies = batch.entropies.array()};
}

}  // namespace detail

inline PolicyResult policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                                const Normalizer& normalizer = {}) {
  const PolicyArrays arrays = detail::arrays_of("policy_loss", batch);
  PolicyResult out{0, {}, Eigen::ArrayXXd(batch.logps.rows(), batch.logps.columns()), {}};
  PolicyGradients gradients{.logps = detail::output(out.dlogps)};
  if (batch.entropies) {
    out.dentropies.resize(batch.logps.rows(), batch.logps.columns());
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

// Chosen answers first, then the rejected ones: [2 B, T].
struct PreferenceBatch {
  Tokens logps;
  Tokens response_mask;
  Tokens ref_logps = {};
};

struct PreferenceResult {
  double loss;
  PreferenceMetrics metrics;
  Eigen::ArrayXXd dlogps;
};

inline PreferenceResult preference_loss(const PreferenceBatch& batch,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer = {}) {
  const auto function = "preference_loss";
  detail::check_like(function, "response_mask", batch.response_mask, "logps", batch.logps);
  detail::check_like(function, "ref_logps", batch.ref_logps, "logps", batch.logps);
  PreferenceArrays arrays;
  arrays.layout = batch.logps.layout();
  arrays.logps = batch.logps.array();
  arrays.response_mask = batch.response_mask.array();
  arrays.ref_logps = batch.ref_logps.array();
  PreferenceResult out{0, {}, Eigen::ArrayXXd(batch.logps.rows(), batch.logps.columns())};
  const PreferenceTotals totals =
      tether::preference_loss(arrays, objective, normalizer, detail::output(out.dlogps));
  out.loss = totals.loss;
  out.metrics = totals.metrics;
  return out;
}

// [B, T] each.
struct ValueBatch {
  Tokens values;
  Tokens returns;
  Tokens response_mask;
  Tokens old_values = {};
};

struct ValueResult {
  double loss;
  ValueMetrics metrics;
  Eigen::ArrayXXd dvalues;
};

inline ValueResult value_loss(const ValueBatch& batch, const ValueObjective& objective = {},
                              const Normalizer& normalizer = {}) {
  const auto like = [&](std::string_view name, const Tokens& tensor) {
    detail::check_like("value_loss", name, tensor, "values", batch.values);
  };
  like("returns", batch.returns);
  like("response_mask", batch.response_mask);
  like("old_values", batch.old_values);
  const ValueArrays arrays{.layout = batch.values.layout(),
                           .values = batch.values.array(),
                           .returns = batch.returns.array(),
                           .response_mask = batch.response_mask.array(),
                           .old_values = batch.old_values.array()};
  ValueResult out{0, {}, Eigen::ArrayXXd(batch.values.rows(), batch.values.columns())};
  const ValueTotals totals =
      tether::value_loss(arrays, objective, normalizer, detail::output(out.dvalues));
  out.loss = totals.loss;
  out.metrics = totals.metrics;
  return out;
}

}  // namespace tether::eigen
