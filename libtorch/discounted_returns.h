#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/returns.h"

namespace tether {

// Rows of rewards; an undefined tensor is absent. Constants all.
struct ReturnsBatch {
  at::Tensor rewards;         // [B, T], or packed [N] with offsets
  at::Tensor response_mask;   // like rewards; slots that are 0 may hold anything
  at::Tensor bootstrap = {};  // [B], the return after the last token; absent: 0
  at::Tensor offsets = {};    // [B + 1] int32 or int64
};

// The returns G of estimators/advantage/gae.h, like rewards, in their dtype; 0 in masked slots. On
// the CPU; tensors elsewhere come over and the result goes back.
at::Tensor discounted_returns(const ReturnsBatch& batch, const DiscountedReturns& options = {});

}  // namespace tether
