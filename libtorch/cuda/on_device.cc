#include "libtorch/cuda/on_device.h"

#include "face/torch_stream.h"
#include "libtorch/cuda/kernels.h"

namespace tether::detail {

const CudaKernels* cuda_kernels(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda() ? &kCudaKernels : nullptr;
}

cuda::Stream current_stream(std::string_view function, const at::Tensor& tensor) {
  return face::torch_stream(function, tensor.get_device());
}

}  // namespace tether::detail
