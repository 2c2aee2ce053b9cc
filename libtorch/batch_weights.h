#pragma once

#include <ATen/core/Tensor.h>

#include "../rl/batch_weight_catalogue.h"

namespace tether {

using BatchWeightBatch = BatchWeightInputs<at::Tensor>;

// Weights of tokens that need the whole batch (rl/batch_weight_catalogue.h), like logps in shape
// and dtype and on their device; 1 in masked slots. Constants. Beside logps and the mask the rule
// says what it needs.
//
//   batch.kl_weights = batch_weights({.logps = logps, .response_mask = mask, .advantages = A},
//                                    KlCovPicks{.share = 0.002});
//
// Over the batch that is given: pack the micro-batches of a step, gather those of its ranks. In
// float64, on the CPU; tensors elsewhere come over and the weights go back. Throws c10::ValueError
// or TypeError.
at::Tensor batch_weights(const BatchWeightBatch& batch, const BatchWeight& rule);

}  // namespace tether
