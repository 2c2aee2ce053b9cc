// The operators on CUDA tensors with kernels on the host (tests/cuda/host_*.cc).

#include "python/on_device.h"

namespace tether::python {

OnDevice::OnDevice(std::string_view, const torch::stable::Tensor&) {}

}  // namespace tether::python
