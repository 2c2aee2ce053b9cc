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
  RowLayout layout = {};
  Tensor offsets;
  if constexpr (face::kHasOffsets<Inputs<Tensor>>) offsets = tensors.offsets;
  if (!offsets.defined()) {
    layout = face::layout_of("", "", first, offsets);
  } else {
    layout = {.rows = offsets.size(0) - 1, .columns = first.size(0)};
    if (offsets.scalar_type() == ScalarType::Int) {
      layout.offsets32 = static_cast<const int32_t*>(offsets.const_data_ptr());
    } else {
      layout.offsets64 = static_cast<const int64_t*>(offsets.const_data_ptr());
    }
  }
  return face::arrays_in(layout, tensors);
}

}  // namespace tether::python
