#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/gae.h"

namespace tether {

using GaeBatch = GaeInputs<at::Tensor>;

struct AdvantagesAndReturns {
  at::Tensor advantages;  // like rewards, in their dtype; 0 in masked slots
  at::Tensor returns;     // advantages + values: what a value head learns
};

// Generalized advantage estimation (estimators/advantage/gae.h says what it does) of tensors [B,
// T], or packed [N] with offsets [B + 1], int32 or int64. On the CPU, rows in parallel; tensors
// elsewhere come over and the results go back.
//
// Throws c10::ValueError or TypeError before any work is done.
AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch,
                                                      const Gae& options = {});

}  // namespace tether
