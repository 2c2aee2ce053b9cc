#pragma once

#include "core/batch.h"
#include "core/half.h"

namespace tether {

// The types of arrays that the CUDA kernels take.
inline constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// body(Stored{})
template <class Body>
void with_device_type(DType dtype, Body body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::bfloat16) body(BFloat16{});
  if (dtype == DType::float16) body(Float16{});
}

}  // namespace tether
