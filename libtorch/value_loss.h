#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/whitening.h"
#include "../rl/kernels/value_loss.h"

namespace tether {

// Rows of tokens for the loss of a value head. An undefined tensor is absent. Types and strides as
// in PolicyBatch. Only values gets a gradient.
struct ValueBatch {
  at::Tensor values;           // [B, T], or packed [N] with offsets
  at::Tensor returns;          // like values; generalized_advantage_estimation gives them
  at::Tensor response_mask;    // like values; slots of weight 0 may hold anything
  at::Tensor old_values = {};  // like values; absent: nothing is clipped
  at::Tensor offsets = {};     // [B + 1] int32 or int64
};

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
