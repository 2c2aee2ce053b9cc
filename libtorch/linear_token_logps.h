#pragma once

#include <ATen/core/Tensor.h>

#include "linear_types.h"
#include "token_logps_types.h"

namespace tether {

// token_logps(hidden weight^T + bias, targets), without ever holding the logits of all tokens.
//
// hidden [..., H], weight and bias: float32, float64, bfloat16 or float16, any strides; of several
// types the widest, under autocast that of autocast. targets [...]: int32 or int64, in [0, V) or
// ignore_index; ignored positions are not multiplied at all, whatever they hold. Chunks of logits
// are made by torch's matrix product in the type of the inputs; results are float32 (float64 for
// float64).
//
// Backward makes the logits again: one more product, and one each for the gradients of hidden and
// weight where they are wanted. Positions with upstream gradients of exactly 0 are skipped there.
// Where all logits are one chunk, they are kept from forward to the first backward instead, if it
// skips none of them: leave positions out by ignore_index, not by a mask on the result.
// The gradient of a weight in bfloat16 or float16 is added up in float32. Memory beyond inputs and
// gradients: chunk_bytes (at least one row of logits), the hidden states of a chunk where positions
// are skipped, 64 bytes a token, and for half weights 6 bytes an element of the weight in backward.
// A second backward raises. By kernels for CUDA (docs/cuda.md), which do not wait to look at the
// ids, ignored and skipped positions are multiplied too, as zeros. On other devices all logits are
// held.
TokenLogps linear_token_logps(const at::Tensor& hidden, const LinearHead& head,
                              const at::Tensor& targets, const LinearOptions& options = {});

namespace detail {

// The path of devices without a kernel; targets int64 and legal.
TokenLogps linear_token_logps_any_device(const at::Tensor& hidden, const LinearHead& head,
                                         const at::Tensor& targets, const LinearOptions& options);

}  // namespace detail

}  // namespace tether
