#include "tests/libtorch_cuda/host_door.h"

#include <optional>

#include "libtorch/cuda/on_device.h"

namespace tether {
namespace {

using detail::CudaKernels;

const CudaKernels* forced = nullptr;
int calls_taken = 0;

template <class Result>
bool has_kernel(const std::optional<Result>& result) {
  return result.has_value();
}

template <auto kMember>
struct Counted;
template <class Result, class... Arguments, Result (*CudaKernels::*kMember)(Arguments...)>
struct Counted<kMember> {
  static Result call(Arguments... arguments) {
    Result result = (detail::kCudaKernels.*kMember)(arguments...);
    calls_taken += has_kernel(result);
    return result;
  }
};

const CudaKernels kCounted{
    .policy_loss = Counted<&CudaKernels::policy_loss>::call,
    .local_counts = Counted<&CudaKernels::local_counts>::call,
};

}  // namespace

OnCuda::OnCuda() : OnCuda(kCounted) {}
OnCuda::OnCuda(const CudaKernels& kernels) {
  forced = &kernels;
  calls_taken = 0;
}
OnCuda::~OnCuda() { forced = nullptr; }
int OnCuda::taken() const { return calls_taken; }

// In place of libtorch/cuda/on_device.cc.
const CudaKernels* detail::cuda_kernels(const at::Tensor&) { return forced; }
cuda::Stream detail::current_stream(std::string_view, const at::Tensor&) { return nullptr; }

}  // namespace tether
