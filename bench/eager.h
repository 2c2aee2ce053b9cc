#pragma once

#include <ATen/core/Tensor.h>

#include "libtorch/token_logps.h"

namespace tether::bench {

struct EagerMetrics {
  double loss, clip_fraction, approx_kl;
};

// PPO clip as trainers write it with torch's operations, forward and backward: the gradient is
// added to logps.grad, and the two metrics that everybody logs are taken.
EagerMetrics eager_ppo(const at::Tensor& logps, const at::Tensor& old_logps,
                       const at::Tensor& advantages, const at::Tensor& response_mask);

// Log-probabilities and entropies likewise.
TokenLogps by_log_softmax(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace tether::bench
