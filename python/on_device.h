#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string_view>

#include "logits/rows_cuda.h"

namespace tether::python {

// As long as it lives, the CUDA device of a tensor is the current one; the current stream there.
struct OnDevice {
  std::shared_ptr<void> guard;
  cuda::Stream stream = nullptr;

  OnDevice(std::string_view function, const torch::stable::Tensor& tensor);
};

}  // namespace tether::python
