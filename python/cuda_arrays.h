#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "core/batch.h"
#include "python/functions.h"

// Tensors on a CUDA device, for cuda_*.cc.

namespace tether::python {

using Maybe = std::optional<Tensor>;

inline Tensor new_doubles_on(const Tensor& device, int64_t count) {
  return torch::stable::new_empty(device, {count}, ScalarType::Double);
}

// The offsets of packed rows are not looked at.
template <template <class> class Inputs>
Inputs<ConstArray> device_arrays(const Inputs<Tensor>& tensors) {
  const Tensor& first = tensors.*Inputs<Tensor>::arguments()[0].member;
  if (!tensors.offsets.defined())
    return face::arrays_in(face::layout_of("", "", first, {}), tensors);
  RowLayout layout{.rows = tensors.offsets.size(0) - 1, .columns = first.size(0)};
  const void* offsets = tensors.offsets.const_data_ptr();
  if (tensors.offsets.scalar_type() == ScalarType::Int) {
    layout.offsets32 = static_cast<const int32_t*>(offsets);
  } else {
    layout.offsets64 = static_cast<const int64_t*>(offsets);
  }
  return face::arrays_in(layout, tensors);
}

}  // namespace tether::python
