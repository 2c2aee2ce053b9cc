// The losses of CUDA tensors.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "core/cuda_numbers.h"
#include "python/cuda_functions.h"
#include "python/loss_functions.h"
#include "rl/kernels/policy_loss_cuda.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/value_loss_cuda.h"

namespace tether::python {
namespace {

// The kernels of a loss:
//   check(batch, options)   throws where there are none
//   bytes(batch, options)   the memory that they work in
//   step(options)           the denominators that the call states; empty: those of the batch
//   run(...)                the loss; counts null: those of the batch
template <class Options>
struct Kernels;

template <>
struct Kernels<PolicyOptions> {
  using Totals = PolicyTotals;
  static constexpr int64_t kCounts = 3;

  static void check(const PolicyArrays& batch, const PolicyOptions& options) {
    cuda::check_supported(PolicyLossFunction::kName.data(), batch, options.objective);
  }
  static int64_t bytes(const PolicyArrays& batch, const PolicyOptions& options) {
    return cuda::policy_workspace_bytes(batch, options.objective);
  }
  static std::vector<double> step(const PolicyOptions& options) {
    const Normalizer& given = options.normalizer;
    const StepCounts step =
        step_counts(PolicyLossFunction::kName, given, {}, options.objective.aggregation);
    if (!given.policy && !given.kl && !given.sequences) return {};
    return {step.policy.tokens, step.kl.tokens, step.policy.sequences};
  }
  static void run(const PolicyArrays& batch, const PolicyOptions& options, const double* counts,
                  const std::vector<MutableArray>& gradients, Totals* totals, void* workspace,
                  cuda::Stream stream) {
    cuda::policy_loss(batch, options.objective, counts, options.normalizer.factor(),
                      {gradients[0], gradients[1]}, totals, workspace, stream);
  }
};

template <>
struct Kernels<PreferenceOptions> {
  using Totals = PreferenceTotals;
  static constexpr int64_t kCounts = 2;

  static void check(const PreferenceArrays&, const PreferenceOptions&) {}
  static int64_t bytes(const PreferenceArrays& batch, const PreferenceOptions&) {
    return cuda::preference_workspace_bytes(batch);
  }
  static std::vector<double> step(const PreferenceOptions& options) {
    const auto function = PreferenceLossFunction::kName;
    const PairNormalizer& given = options.normalizer;
    check_denominators(function, given, options.objective);
    require(given.pairs || !given.tokens, [&] {
      return named(function, "normalizer.pairs") +
             " must be given where normalizer.tokens is, on a CUDA device, got none";
    });
    if (!given.pairs) return {};
    return {*given.pairs, given.tokens.value_or(0)};
  }
  static void run(const PreferenceArrays& batch, const PreferenceOptions& options,
                  const double* counts, const std::vector<MutableArray>& gradients, Totals* totals,
                  void* workspace, cuda::Stream stream) {
    cuda::preference_loss(batch, options.objective, counts, options.normalizer.factor(),
                          gradients[0], totals, workspace, stream);
  }
};

template <>
struct Kernels<ValueOptions> {
  using Totals = ValueTotals;
  static constexpr int64_t kCounts = 2;

  static void check(const ValueArrays&, const ValueOptions&) {}
  static int64_t bytes(const ValueArrays& batch, const ValueOptions&) {
    return cuda::value_workspace_bytes(batch);
  }
  static std::vector<double> step(const ValueOptions& options) {
    const Normalizer& given = options.normalizer;
    const TermCounts step =
        step_counts(ValueLossFunction::kName, given, {}, options.objective.aggregation).policy;
    if (!given.policy && !given.sequences) return {};
    return {step.tokens, step.sequences};
  }
  static void run(const ValueArrays& batch, const ValueOptions& options, const double* counts,
                  const std::vector<MutableArray>& gradients, Totals* totals, void* workspace,
                  cuda::Stream stream) {
    cuda::value_loss(batch, options.objective, counts, options.normalizer.factor(), gradients[0],
                     totals, workspace, stream);
  }
};

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

// The denominators of the step, on the device: those that are there, or into `own`.
template <class Loss>
const double* counts_of(const Call<Loss>& call, const std::vector<double>& step, double* own,
                        cuda::Stream stream) {
  if constexpr (requires { Loss::kMore; }) {
    constexpr int64_t kCounts = Kernels<typename Loss::Options>::kCounts;
    if (call.more) return numbers_of<const double>(Loss::kName, Loss::kMore, *call.more, kCounts);
  }
  if (step.empty()) return nullptr;
  cuda::set_numbers(Loss::kName, step, own, stream);
  return own;
}

}  // namespace

template <class Loss>
  requires Loss::kGradient
static std::vector<Tensor> on_cuda(const Call<Loss>& call) {
  using Kernel = Kernels<typename Loss::Options>;
  Loss::check(Loss::kName, presence_of(call.tensors), face::count_rows(call.tensors), call.options);
  Kernel::check(call.arrays, call.options);
  const std::vector<double> step = Kernel::step(call.options);
  const Tensor& input = tensor_of(call.tensors, "");
  const OnDevice device(Loss::kName, input);
  const Gradients gradients(call);
  DeviceTotals totals(input, sizeof(typename Kernel::Totals) / sizeof(double));
  const int64_t room = call.more ? 0 : static_cast<int64_t>(step.size());
  const int64_t doubles = (Kernel::bytes(call.arrays, call.options) + 7) / 8;
  const Tensor memory = new_doubles_on(input, room + doubles);
  auto* own = static_cast<double*>(memory.mutable_data_ptr());
  Kernel::run(call.arrays, call.options, counts_of(call, step, own, device.stream), gradients.views,
              static_cast<typename Kernel::Totals*>(totals.data()), own + room, device.stream);
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
