#include "tests/libtorch_cuda/host_door.h"

#include <torch/library.h>

#include "libtorch/cuda/on_device.h"

namespace tether {
namespace {

using detail::CudaKernels;

const CudaKernels* forced = nullptr;
int calls_taken = 0;

// A call of the kernels, counted unless they leave it to others.
template <auto kMember>
struct Counted;
template <class Result, class... Arguments, Result (*CudaKernels::*kMember)(Arguments...)>
struct Counted<kMember> {
  static Result call(Arguments... arguments) {
    ++calls_taken;
    if constexpr (requires(Result result) { result.has_value(); }) {
      Result result = (detail::kCudaKernels.*kMember)(arguments...);
      if (!result.has_value()) --calls_taken;
      return result;
    } else {
      return (detail::kCudaKernels.*kMember)(arguments...);
    }
  }
};

const CudaKernels kCounted{
    .policy_loss = Counted<&CudaKernels::policy_loss>::call,
    .has_policy_loss = detail::kCudaKernels.has_policy_loss,
    .policy_gradient_of_logits = Counted<&CudaKernels::policy_gradient_of_logits>::call,
    .local_counts = Counted<&CudaKernels::local_counts>::call,
    .pair_counts = Counted<&CudaKernels::pair_counts>::call,
    .preference_loss = Counted<&CudaKernels::preference_loss>::call,
    .has_preference_loss = detail::kCudaKernels.has_preference_loss,
    .value_loss = Counted<&CudaKernels::value_loss>::call,
    .row_statistics = Counted<&CudaKernels::row_statistics>::call,
    .row_gradients = Counted<&CudaKernels::row_gradients>::call,
    .categorical_kl = Counted<&CudaKernels::categorical_kl>::call,
    .categorical_kl_gradients = Counted<&CudaKernels::categorical_kl_gradients>::call,
    .advantage = Counted<&CudaKernels::advantage>::call,
    .group_advantage = Counted<&CudaKernels::group_advantage>::call,
    .whiten = Counted<&CudaKernels::whiten>::call,
};

// For tensors without memory, of which torch has this one in Python alone.
at::Tensor where_without_memory(const at::Tensor& condition, const at::Tensor& a,
                                const at::Tensor& b) {
  return (a + b) * condition;
}
TORCH_LIBRARY_IMPL(aten, Meta, library) { library.impl("where.self", where_without_memory); }

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
