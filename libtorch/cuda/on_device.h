#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <string_view>

#include "../../core/cuda_stream.h"

namespace tether::detail {

cuda::Stream current_stream(std::string_view function, const at::Tensor& tensor);

// As long as it lives, the device of a tensor is the current one; the current stream there.
struct OnDevice {
  c10::DeviceGuard guard;
  cuda::Stream stream;

  OnDevice(std::string_view function, const at::Tensor& tensor)
      : guard(tensor.device()), stream(current_stream(function, tensor)) {}
};

}  // namespace tether::detail
