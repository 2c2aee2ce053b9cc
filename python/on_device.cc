#include "python/on_device.h"

#include <torch/csrc/stable/accelerator.h>

#include "face/torch_stream.h"

namespace tether::python {

OnDevice::OnDevice(std::string_view function, const torch::stable::Tensor& tensor)
    : stream(face::torch_stream(function, tensor.get_device_index())) {
  guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index());
}

}  // namespace tether::python
