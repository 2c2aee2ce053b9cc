#pragma once

#include <cstdint>

#include "arguments.h"

namespace tether::face {

// Views of a checked batch whose memory is a device's: its offsets are not looked at.
template <template <class> class Inputs, class Tensor>
Inputs<ConstArray> device_arrays(const Inputs<Tensor>& batch) {
  const Tensor& first = batch.*Inputs<Tensor>::arguments()[0].member;
  Tensor offsets;
  if constexpr (kHasOffsets<Inputs<Tensor>>) offsets = batch.offsets;
  if (!offsets.defined()) return arrays_in(layout_of("", "", first, offsets), batch);
  RowLayout layout{.rows = offsets.size(0) - 1, .columns = first.size(0)};
  if (Access<Tensor>::element(offsets).name == "int32") {
    layout.offsets32 = static_cast<const int32_t*>(offsets.const_data_ptr());
  } else {
    layout.offsets64 = static_cast<const int64_t*>(offsets.const_data_ptr());
  }
  return arrays_in(layout, batch);
}

}  // namespace tether::face
