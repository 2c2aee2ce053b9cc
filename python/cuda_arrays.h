#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "python/functions.h"

// Tensors on a CUDA device, for cuda_*.cc.

namespace tether::python {

using Maybe = std::optional<Tensor>;

inline Tensor new_doubles_on(const Tensor& device, int64_t count) {
  return torch::stable::new_empty(device, {count}, ScalarType::Double);
}

// For the logits of a support while their gradient is written.
inline Tensor memory_of_kept(const Maybe& support, const Tensor& device, int64_t of_each) {
  const int64_t ids = support ? support->numel() : 0;
  return torch::stable::new_empty(device, {of_each * ids}, ScalarType::Float);
}

}  // namespace tether::python
