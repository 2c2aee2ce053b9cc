#pragma once

#include <ATen/core/Tensor.h>

#include "../rl/catalogue.h"
#include "evaluators.h"
#include "policy_batch.h"

namespace tether {

// The loss of a policy objective, its gradient and its metrics in one pass; backward is a scaling.
//
// Denominators come from `normalizer` (the whole optimizer step's, see local_counts), else from
// this batch. On the CPU by the fused kernel, with the same bits for any number of threads; on
// others by torch, or kernels (docs/cuda.md). Double backward raises. Inputs are never written to.
//
// Throws c10::ValueError, TypeError or IndexError (the same in Python), before any work is done.
LossOutput policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                       const Normalizer& normalizer = {});

// The terms W S + beta K - entropy_coef H of each token, like logps, before weights and
// aggregation; 0 in masked slots. For aggregations of the caller's own: backward takes any gradient
// of it. By torch's operations on every device, at torch's speed; policy_loss is the fast way where
// its aggregations do. A second derivative raises. Throws as policy_loss.
at::Tensor policy_token_losses(const PolicyBatch& batch, const PolicyObjective& objective);

// What the caller adds up over the micro-batches and ranks of an optimizer step, and then passes to
// every policy_loss of that step. Reads the mask (one synchronisation on other devices).
Normalizer local_counts(const PolicyBatch& batch, const PolicyObjective& objective);

inline LossOutput ppo_loss(const PolicyBatch& batch, const PpoClip& clip = {},
                           const Normalizer& normalizer = {}) {
  return policy_loss(batch, presets::ppo(clip), normalizer);
}

inline LossOutput grpo_loss(const PolicyBatch& batch, double beta = 0, const PpoClip& clip = {},
                            const Normalizer& normalizer = {}) {
  return policy_loss(batch, presets::grpo(beta, clip), normalizer);
}

namespace detail {

// policy_loss as other devices take it, on any device.
LossOutput policy_loss_any_device(const PolicyBatch& batch, const PolicyObjective& objective,
                                  const Normalizer& normalizer = {});

}  // namespace detail
}  // namespace tether
