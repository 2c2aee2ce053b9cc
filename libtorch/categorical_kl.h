#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../core/fields.h"

namespace tether {

struct CategoricalKlOptions {
  double temperature = 1;  // both are divided by it
  at::Tensor mask = {};    // [...] bool: positions with 0 are not read and get zeros

  static constexpr auto fields() {
    return std::tuple{field("temperature", &CategoricalKlOptions::temperature, Range{1e-6, 1e6})};
  }
};

// Each [...], in nats.
struct CategoricalKl {
  at::Tensor kl;          // KL(q || p), the "reverse" KL of a policy q to its reference p
  at::Tensor reverse_kl;  // KL(p || q)
  at::Tensor entropies;   // H(q)
};

// Exact KL divergences over the whole vocabulary between q = softmax(q_logits / T) and
// p = softmax(p_logits / T), one pass over both (logits/pair_kl.h says what -inf does).
//
// q_logits, p_logits [..., V]: the same type (float32, float64, bfloat16, float16) and shape, any
// strides. Results are float32 (float64 for float64). Differentiable in both, once; memory: 56
// bytes a position and the gradients. On other devices than the CPU, but for those with kernels
// (docs/cuda.md), torch's own operations.
CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options = {});

namespace detail {

// With kept ids [..., K] in int64, contiguous, of a support that has been checked, over these;
// undefined: over all.
CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options, const at::Tensor& support);

CategoricalKl categorical_kl_any_device(const at::Tensor& q_logits, const at::Tensor& p_logits,
                                        const CategoricalKlOptions& options);

}  // namespace detail
}  // namespace tether
