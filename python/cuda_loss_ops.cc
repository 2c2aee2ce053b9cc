// The losses of CUDA tensors.

#include <torch/csrc/stable/library.h>

#include <string_view>
#include <vector>

#include "face/loss_on_device.h"
#include "python/cuda_functions.h"
#include "python/loss_functions.h"
#include "rl/kernels/policy_loss_cuda.h"

namespace tether::python {
namespace {

// The gradients of a loss, in the order of its results, and their views.
struct Gradients {
  std::vector<Tensor> tensors;
  std::vector<MutableArray> views;

  template <class Loss>
  explicit Gradients(const Call<Loss>& call) {
    const Tensor& first = tensor_of(call.tensors, "");
    for (const Result& each : Loss::kResults) {
      if (each.kind != "gradient") continue;
      const Tensor& of = tensor_of(call.tensors, each.of);
      const bool wanted = call.with_gradient && of.defined();
      tensors.push_back(new_gradient_on(wanted, of.defined() ? of : first, views.emplace_back()));
    }
  }
};

// The denominators that are on the device, if there are any.
template <class Loss>
const double* counts_of(const Call<Loss>& call) {
  if constexpr (requires { Loss::kMore; }) {
    using Kernels = face::LossKernels<decltype(call.options.objective)>;
    if (call.more) {
      return numbers_of<const double>(Loss::kName, Loss::kMore, *call.more, Kernels::kCounts);
    }
  }
  return nullptr;
}

}  // namespace

template <class Loss>
  requires Loss::kGradient
static std::vector<Tensor> on_cuda(const Call<Loss>& call) {
  Loss::check(Loss::kName, presence_of(call.tensors), face::count_rows(call.tensors), call.options);
  const face::LossOnDevice loss(call.arrays, call.options.objective, call.options.normalizer);
  const Tensor& input = tensor_of(call.tensors, "");
  const OnDevice device(Loss::kName, input);
  const Gradients gradients(call);
  DeviceTotals totals(input, loss.kNumbers);
  const Tensor memory = new_doubles_on(input, loss.memory());
  loss.run(counts_of(call), gradients.views, totals.data(),
           static_cast<double*>(memory.mutable_data_ptr()), device.stream);
  std::vector<Tensor> out;
  auto gradient = gradients.tensors.begin();
  for (const Result& each : Loss::kResults) {
    if (each.kind == "scalar") out.push_back(totals.loss());
    if (each.kind == "gradient") out.push_back(*gradient++);
    if (each.kind == "block") out.push_back(totals.next_block(each));
  }
  return out;
}

static std::vector<Tensor> on_cuda(const Call<OnCuda<LocalCountsFunction>>& call) {
  const PolicyObjective& objective = call.options.objective;
  const Tensor& logps = call.tensors.logps;
  const Tensor counts = new_doubles_on(logps, 3);
  const int64_t bytes = cuda::policy_workspace_bytes(call.arrays, objective);
  const Tensor memory = new_doubles_on(logps, (bytes + 7) / 8);
  const OnDevice device(LocalCountsFunction::kName, logps);
  cuda::local_counts(call.arrays, objective, static_cast<double*>(counts.mutable_data_ptr()),
                     memory.mutable_data_ptr(), device.stream);
  return {counts};
}

// With denominators that are on the device, as those that ranks have added up.
template <class Loss>
struct ByCounts : OnCuda<Loss> {
  static constexpr std::string_view kMore = "counts";

  static std::vector<Tensor> run(const Call<ByCounts>& call) { return on_cuda(call); }
};

}  // namespace tether::python

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  using namespace tether::python;
  define<ByCounts<PolicyLossFunction>>(library, "policy_loss_by_counts");
  define<ByCounts<PreferenceLossFunction>>(library, "preference_loss_by_counts");
  define<ByCounts<ValueLossFunction>>(library, "value_loss_by_counts");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  using namespace tether::python;
  implement<PolicyLossFunction, LocalCountsFunction, PreferenceLossFunction, ValueLossFunction>(
      library);
  implement_as<ByCounts<PolicyLossFunction>>(library, "policy_loss_by_counts");
  implement_as<ByCounts<PreferenceLossFunction>>(library, "preference_loss_by_counts");
  implement_as<ByCounts<ValueLossFunction>>(library, "value_loss_by_counts");
}
