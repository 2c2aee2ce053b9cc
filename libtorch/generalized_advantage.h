#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/gae.h"

namespace tether {

// Rows of tokens for generalized advantage estimation (estimators/advantage/gae.h says what it
// does). An undefined tensor is absent. Constants all: no gradient flows into advantages.
struct GaeBatch {
  at::Tensor rewards;                 // [B, T], or packed [N] with offsets
  at::Tensor values;                  // like rewards
  at::Tensor response_mask;           // like rewards; slots that are 0 may hold anything
  at::Tensor bootstrap = {};          // [B], the value after the last token; absent: 0
  at::Tensor done = {};               // like rewards, bool: the episode ends at this token
  at::Tensor truncated = {};          // like rewards, bool: it is cut off, not over
  at::Tensor truncation_values = {};  // like rewards; needed with truncated
  at::Tensor lambdas = {};            // [B] or like rewards; absent: options.lambda
  at::Tensor offsets = {};            // [B + 1] int32 or int64
};

struct AdvantagesAndReturns {
  at::Tensor advantages;  // like rewards, in their dtype; 0 in masked slots
  at::Tensor returns;     // advantages + values: what a value head learns
};

// On the CPU, rows in parallel; tensors elsewhere come over and the results go back.
AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch,
                                                      const Gae& options = {});

}  // namespace tether
