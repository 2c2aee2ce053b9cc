#include "python/on_device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <string>

#include "core/check.h"

namespace tether::python {
namespace {

// In torch's library for CUDA alone, which is in the process where tensors of CUDA are.
using CurrentStream = int (*)(int32_t device, void** stream);

CurrentStream found_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

OnDevice::OnDevice(std::string_view function, const torch::stable::Tensor& tensor) {
  static const CurrentStream current_stream = found_current_stream();
  const int32_t index = tensor.get_device_index();
  require(current_stream != nullptr && current_stream(index, &stream) == 0, [&] {
    return std::string(function) + ": torch must be one with CUDA for a kernel on its devices";
  });
  guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
}

}  // namespace tether::python
