#pragma once

#include <ATen/core/Tensor.h>

#include "../logits/top_k_kl.h"

namespace tether {

// What is known of p, constants: log-probabilities of a few ids, and of the sampled one.
struct TopKReference {
  at::Tensor head_ids;      // [..., k]: int32 or int64, all different at a position; k >= 0
  at::Tensor head_logps;    // [..., k]
  at::Tensor targets;       // [...]: sampled from q, or ignore_index: that position gives 0
  at::Tensor target_logps;  // [...]; both may be undefined with a bucket
};

// KL(q || p) [nats] of each position, q = softmax(q_logits / T) in full and p from a head of ids
// and a sample (logits/top_k_kl.h has the formulas): unbiased in value and gradient with
// TailEstimate::k1 and k3, while p costs k numbers a position instead of V. KL(p || q), of a
// teacher p, with TailEstimate::reverse_bucket.
//
//   auto ids = std::get<1>(at::topk(q_logits, 20));                  // or those of p
//   at::Tensor kl = top_k_kl(q_logits, {ids, head_logps(p_logits, ids), targets, target_logps});
//
// options.precision is that of head_logps: float32 by default; where P is not much larger, k1.
// q_logits [..., V]: float32, float64, bfloat16 or float16, any strides. Log-probabilities: any
// floating type. The result is float32 (float64 for float64), differentiable in q_logits, once, and
// not negative but with TailEstimate::k1. On other devices than the CPU torch's own operations.
at::Tensor top_k_kl(const at::Tensor& q_logits, const TopKReference& p,
                    const TopKKlOptions& options = {});

// The log-probabilities [..., k] of several ids under softmax(logits / T), constants.
at::Tensor head_logps(const at::Tensor& logits, const at::Tensor& head_ids, double temperature = 1);

namespace detail {

at::Tensor top_k_kl_any_device(const at::Tensor& q_logits, const TopKReference& p,
                               const TopKKlOptions& options);

}  // namespace detail
}  // namespace tether
