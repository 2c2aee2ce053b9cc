#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "../rl/catalogue.h"
#include "../rl/policy_metrics.h"
#include "tensor_formula.h"

namespace tether {

// One batch of token rows. An undefined tensor is absent. Log-probabilities are in nats.
//
// logps may be float32, float64, bfloat16 or float16, of any strides; arithmetic is in float32, in
// float64 for float64. The other arrays may be narrower, not wider. Only logps and entropies get a
// gradient.
struct PolicyBatch {
  at::Tensor logps;       // [B, T], or packed [N] with offsets
  at::Tensor advantages;  // [B] or [B, 1], or like logps, as which [B] is read if B = N
  at::Tensor
      response_mask;  // like logps; bool, or weights in [0, 1]: slots of weight 0 may hold anything
  at::Tensor old_logps = {};  // like logps; absent: logps, as constants
  at::Tensor ref_logps = {};  // like logps; needed when beta > 0
  at::Tensor entropies = {};  // like logps, of the policy; needed when entropy_coef is not 0
  at::Tensor offsets =
      {};  // [B + 1] int32 or int64, from 0 to N: row i is offsets[i] .. offsets[i + 1]
};

// PolicyMetrics on the device of the loss: [value, count] pairs [kSums, 2] and maxima [kMaxima], in
// float64. For the figures of a step over ranks: all-reduce `sums` by sum and `maxima` by max.
struct PolicyMetricTensors {
  at::Tensor sums;
  at::Tensor maxima;

  // Copies to the host: the one synchronisation, and the caller asks for it.
  PolicyMetrics to_host() const;
  std::map<std::string, double> to_map() const;
};

struct LossOutput {
  at::Tensor loss;  // scalar, of the dtype of the arithmetic
  PolicyMetricTensors metrics;
};

// The loss of a policy objective, its gradient and its metrics in one pass; backward is a scaling.
//
// Denominators come from `normalizer` (the whole optimizer step's, see local_counts), else from
// this batch. On the CPU by the fused kernel, with the same bits for any number of threads; on
// other devices by torch's operations. Double backward raises. Inputs are never written to.
//
// Throws c10::ValueError, TypeError or IndexError (the same in Python), before any work is done.
LossOutput policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                       const Normalizer& normalizer = {});

// The terms S + beta K - entropy_coef H of each token, like logps, before weights and aggregation;
// 0 in masked slots. For aggregations of the caller's own: backward takes any gradient of it. By
// torch's operations on every device, at torch's speed; policy_loss is the fast way where its
// aggregations do. Throws as policy_loss.
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
