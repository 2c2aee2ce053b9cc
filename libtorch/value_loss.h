#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "../estimators/advantage/whitening.h"
#include "../rl/catalogue.h"
#include "../rl/kernels/value_loss.h"
#include "evaluators.h"

namespace tether {

using ValueBatch = ValueInputs<at::Tensor>;

// ValueMetrics on the device of the loss: [kSums] in float64.
struct ValueMetricTensors {
  at::Tensor sums;

  // Copies to the host: the one synchronisation.
  ValueMetrics to_host() const;
  std::map<std::string, double> to_map() const;
};

struct ValueOutput {
  at::Tensor loss;  // scalar, of the dtype of the arithmetic
  ValueMetricTensors metrics;
};

// The loss of a value objective (rl/value_objective.h), its gradient and its metrics in one pass;
// backward is a scaling, a second derivative raises. Denominators from `normalizer`, else of this
// batch. On the CPU by the fused kernel, with the same bits for any number of threads; on other
// devices by torch's operations, or kernels (docs/cuda.md).
ValueOutput value_loss(const ValueBatch& batch, const ValueObjective& objective = {},
                       const Normalizer& normalizer = {});

// Values at active slots with mean 0 and variance 1 (estimators/advantage/whitening.h), in their
// dtype; for advantages [B, T] or packed [N]. On the CPU or, with kernels, CUDA; by its own
// moments.
at::Tensor whiten(const at::Tensor& values, const at::Tensor& response_mask,
                  const Whitening& options = {});

namespace detail {

// value_loss as other devices take it, on any device.
ValueOutput value_loss_any_device(const ValueBatch& batch, const ValueObjective& objective = {},
                                  const Normalizer& normalizer = {});

}  // namespace detail
}  // namespace tether
