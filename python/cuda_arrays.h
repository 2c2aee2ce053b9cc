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

}  // namespace tether::python
