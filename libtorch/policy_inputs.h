#pragma once

#include <string_view>

#include "../rl/kernels/arrays.h"
#include "../rl/policy_objective.h"
#include "policy_batch.h"

namespace tether::detail {

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
