#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/whitening.h"
#include "../rl/kernels/value_loss.h"

namespace tether {

using ValueBatch = ValueInputs<at::Tensor>;

struct ValueOutput {
  at::Tensor loss;       // scalar, of the dtype of the arithmetic
  ValueMetrics metrics;  // on the host
};

// The loss of rl/value_objective.h, its gradient and its metrics in one pass; backward is a
// scaling, a second derivative raises. Denominators from `normalizer`, else of this batch. CPU
// only.
ValueOutput value_loss(const ValueBatch& batch, const ValueObjective& objective = {},
                       const Normalizer& normalizer = {});

// Values at active slots with mean 0 and variance 1 (estimators/advantage/whitening.h), in their
// dtype; for advantages [B, T] or packed [N]. CPU only; the moments are those of this tensor.
at::Tensor whiten(const at::Tensor& values, const at::Tensor& response_mask,
                  const Whitening& options = {});

}  // namespace tether
