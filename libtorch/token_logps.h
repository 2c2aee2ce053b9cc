#pragma once

#include <ATen/core/Tensor.h>

#include "token_logps_types.h"

namespace tether {

// Log-probabilities [nats] of the target tokens under softmax(x), and the entropies, where x are
// the logits scaled, capped and divided by the temperature as RowOptions say:
//
//   logp = x_y - log sum_v exp(x_v),  entropy = -sum_v p_v log p_v
//
// logits [..., V]: float32, float64, bfloat16 or float16, any strides, never changed unless they
// are the gradient_buffer, -inf allowed (logits/rows.h says what it does). targets [...]: int32 or
// int64, in [0, V) or ignore_index. Results are float32 (float64 for float64 logits), whatever the
// logits are: bfloat16 logits lose nothing here, while log_softmax in bfloat16 is off by up to 0.15
// nats.
//
// Memory beyond the logits: 64 bytes a row, and in backward the gradient, a contiguous tensor like
// logits, unless there is a buffer. Positions with upstream gradients of exactly 0, and ignored
// ones, are not read there. Differentiable in logits, once: a second backward raises. On other
// devices than the CPU, but for those with kernels (docs/cuda.md), torch's own operations give the
// same results at torch's speed (no buffer and no shards there); checking the ids waits for the
// device. The kernels do not look at them: another id gives NaN for its row.
//
// Of a shard, results are those of the whole vocabulary and the gradient that of its own columns.
TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options = {});

namespace detail {

// token_logps, with kept ids [..., K] in int64, contiguous, of a support that has been checked,
// over these; undefined: over all.
TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options, const at::Tensor& support);

// The path of devices without a kernel; targets int64 and legal.
TokenLogps token_logps_any_device(const at::Tensor& logits, const at::Tensor& targets,
                                  const TokenLogpsOptions& options);

}  // namespace detail

}  // namespace tether
