#pragma once

#include <string_view>

#include "../rl/kernels/arrays.h"
#include "../rl/policy_objective.h"
#include "policy_batch.h"

namespace tether::detail {

// The batch with every rule of PolicyBatch checked and every array in a type and shape that the
// loops take: masks of integers as float32, advantages [B] as [B, 1]. Throws before anything is
// computed.
PolicyBatch checked(std::string_view function, const PolicyBatch& batch);

// A checked batch on the CPU, as the kernels see it. Refers to the tensors of `batch`.
class PolicyViews {
 public:
  explicit PolicyViews(const PolicyBatch& batch);
  const PolicyArrays& arrays() const { return arrays_; }

 private:
  PolicyArrays arrays_;
};

PolicyMetricTensors metric_tensors(const PolicyMetrics& metrics);

// Loss, gradients (undefined unless wanted) and metrics.
struct ComputedLoss {
  at::Tensor loss;
  at::Tensor dlogps;
  at::Tensor dentropies;
  PolicyMetricTensors metrics;
};
struct WantedGradients {
  bool logps;
  bool entropies;
};
// By torch's operations, on any device.
ComputedLoss tensor_policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                                const Normalizer& normalizer, WantedGradients wanted);
at::Tensor tensor_token_losses(const PolicyBatch& batch, const PolicyObjective& objective);

}  // namespace tether::detail
