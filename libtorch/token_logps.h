#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace tether {

struct TokenLogpsOptions {
  double temperature = 1;       // logits are divided by it; in [1e-6, 1e6]
  bool entropies = false;       // also return entropies
  int64_t ignore_index = -100;  // targets that are not looked up: logp 0, entropy 0, gradient 0
};

struct TokenLogps {
  at::Tensor logps;      // like targets
  at::Tensor entropies;  // like targets; undefined unless asked for
};

// Log-probabilities [nats] of the target tokens under softmax(logits / T), and the entropies:
//
//   logp = x_y - log sum_v exp(x_v),  entropy = -sum_v p_v log p_v,  x = logits / T
//
// logits [..., V]: float32, float64, bfloat16 or float16, any strides, never changed, -inf allowed
// (core/rows.h says what it does). targets [...]: int32 or int64, in [0, V) or ignore_index.
// Results are float32 (float64 for float64 logits), whatever the logits are: bfloat16 logits lose
// nothing here, while log_softmax in bfloat16 is off by up to 0.15 nats.
//
// Memory beyond the logits: 32 bytes a row, and in backward the gradient, a contiguous tensor like
// logits. Positions with upstream gradients of exactly 0, and ignored ones, are not read there.
// Differentiable in logits, once: a second backward raises. On other devices than the CPU torch's
// own operations give the same results at torch's speed; checking the ids waits for the device.
TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options = {});

namespace detail {

// The path of devices without a kernel; targets int64 and legal.
TokenLogps token_logps_any_device(const at::Tensor& logits, const at::Tensor& targets,
                                  const TokenLogpsOptions& options);

}  // namespace detail

}  // namespace tether
