#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "../rl/catalogue.h"
#include "../rl/kernels/arrays.h"
#include "../rl/preference_metrics.h"
#include "evaluators.h"

namespace tether {

// Pairs of answers (rl/kernels/arrays.h): 2 B rows, all chosen answers first, then the rejected
// ones in the same order; [2 B, T], packed [N] with offsets, or the log-probabilities of whole
// answers [2 B], for which the mask may be absent. Types and strides as in PolicyBatch. Only logps
// gets a gradient.
using PreferenceBatch = PreferenceInputs<at::Tensor>;

// PreferenceMetrics on the device of the loss: [value, count] pairs [kSums, 2] in float64.
struct PreferenceMetricTensors {
  at::Tensor sums;

  // Copies to the host: the one synchronisation.
  PreferenceMetrics to_host() const;
  std::map<std::string, double> to_map() const;
};

struct PreferenceOutput {
  at::Tensor loss;  // scalar, of the dtype of the arithmetic
  PreferenceMetricTensors metrics;
};

// The loss of a preference objective (rl/preference_objective.h), its gradient and its metrics;
// backward is a scaling, a second derivative raises. The mean is over the pairs of `normalizer`
// (the whole optimizer step's, see local_counts), else of this batch. On the CPU by the fused
// kernel, with the same bits for any number of threads; on others by torch, or kernels
// (docs/cuda.md).
//
// Throws c10::ValueError or TypeError before any work is done.
PreferenceOutput preference_loss(const PreferenceBatch& batch, const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer = {});

// The pairs of this batch: what the caller adds up over an optimizer step.
PairNormalizer local_counts(const PreferenceBatch& batch);

inline PreferenceOutput dpo_loss(const PreferenceBatch& batch, double beta = 0.1,
                                 double label_smoothing = 0,
                                 const PairNormalizer& normalizer = {}) {
  return preference_loss(batch, presets::cdpo(beta, label_smoothing), normalizer);
}

namespace detail {

// Answers [2 B] as rows of one token; other batches as they are.
PreferenceBatch answers_as_rows(const PreferenceBatch& batch);

// preference_loss as other devices take it, on any device.
PreferenceOutput preference_loss_any_device(const PreferenceBatch& batch,
                                            const PreferenceObjective& objective,
                                            const PairNormalizer& normalizer = {});

}  // namespace detail
}  // namespace tether
