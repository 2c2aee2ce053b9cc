#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "../core/check.h"
#include "../core/cuda_stream.h"

namespace tether::face {

// torch's current stream on a CUDA device. By a C function of torch's library for CUDA, which is in
// the process where tensors of CUDA are: nothing here is linked to it.
inline cuda::Stream torch_stream(std::string_view function, int32_t device) {
  using CurrentStream = int (*)(int32_t device, void** stream);
  static const auto current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  cuda::Stream stream = nullptr;
  require(current_stream != nullptr && current_stream(device, &stream) == 0, [&] {
    return std::string(function) + ": torch must be one with CUDA for a kernel on its devices";
  });
  return stream;
}

}  // namespace tether::face
