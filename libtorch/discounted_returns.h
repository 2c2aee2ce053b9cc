#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/returns.h"

namespace tether {

using ReturnsBatch = ReturnsInputs<at::Tensor>;

// The returns G of estimators/advantage/returns.h, like rewards ([B, T], or packed [N] with offsets
// [B + 1]), in their dtype; 0 in masked slots. Constants all. On the CPU; tensors elsewhere come
// over and the result goes back.
at::Tensor discounted_returns(const ReturnsBatch& batch, const DiscountedReturns& options = {});

}  // namespace tether
