// The operators of the Python package that have kernels on CUDA devices (see ops.cc about the ABI):
// a library of its own, beside libtether_ops.so, whose schemas it takes. It loads without a driver
// and with a torch without CUDA, where nothing ever calls it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "logits/rows_cuda.h"
#include "python/cuda_arrays.h"
#include "python/functions.h"
#include "python/logits_rows.h"
#include "python/loss_functions.h"
#include "python/on_device.h"
#include "python/row_functions.h"
#include "rl/kernels/policy_loss_cuda.h"

namespace tether {
namespace {

using namespace python;
using Names = std::vector<Name>;

// ---- losses -------------------------------------------------------------------------------------

// As new_gradient, on the device of the input.
Tensor device_gradient(bool wanted, const Tensor& input, MutableArray& view) {
  if (!wanted) return torch::stable::new_empty(input, {0});
  const bool half = input.scalar_type() == ScalarType::Half;
  const Tensor out = torch::stable::new_empty(input, sizes_of(input),
                                              half ? ScalarType::Float : input.scalar_type());
  view = face::mutable_token_array(out);
  return out;
}

// Totals on a device as the results of an operator.
struct DeviceTotals {
  static constexpr int64_t kSums = 2 * PolicyMetrics::kSums, kMaxima = PolicyMetrics::kMaxima;
  static_assert(sizeof(PolicyTotals) == (1 + kSums + kMaxima) * sizeof(double));

  Tensor numbers;

  explicit DeviceTotals(const Tensor& device)
      : numbers(new_doubles_on(device, 1 + kSums + kMaxima)) {}
  PolicyTotals* data() const { return static_cast<PolicyTotals*>(numbers.mutable_data_ptr()); }
  Tensor loss() const {
    return torch::stable::to(torch::stable::select(numbers, 0, 0), ScalarType::Float);
  }
  // Results share no memory.
  Tensor part(int64_t first, std::vector<int64_t> sizes, int64_t count) {
    return torch::stable::clone(
        torch::stable::view(torch::stable::narrow(numbers, 0, first, count), sizes));
  }
  Tensor sums() { return part(1, {PolicyMetrics::kSums, 2}, kSums); }
  Tensor maxima() { return part(1 + kSums, {kMaxima}, kMaxima); }
};

// `counts`: the denominators of the step, [3] on the device; without, those of the normalizer.
template <class Function>
std::vector<Tensor> policy_results(const Call<Function>& call,
                                   const std::optional<Tensor>& counts) {
  const char* function = PolicyLossFunction::kName.data();
  const Tensor &logps = call.tensors.logps, &entropies = call.tensors.entropies;
  const PolicyObjective& objective = call.options.objective;
  const Normalizer& normalizer = call.options.normalizer;
  cuda::check_supported(function, call.arrays, objective);
  const bool bonus = call.with_gradient && entropies.defined();
  PolicyGradients gradients;
  const Tensor dlogps = device_gradient(call.with_gradient, logps, gradients.logps);
  const Tensor dentropies =
      device_gradient(bonus, entropies.defined() ? entropies : logps, gradients.entropies);
  DeviceTotals totals(logps);
  const int64_t bytes = cuda::policy_workspace_bytes(call.arrays, objective);
  const Tensor memory = new_doubles_on(logps, 3 + (bytes + 7) / 8);
  auto* own_counts = static_cast<double*>(memory.mutable_data_ptr());
  const OnDevice device(function, logps);
  const double* step = own_counts;
  if (counts) {
    step = numbers_of<const double>(function, "counts", *counts, 3);
  } else if (!cuda::set_counts(function, normalizer, objective.aggregation, own_counts,
                               device.stream)) {
    step = nullptr;
  }
  cuda::policy_loss(call.arrays, objective, step, normalizer.factor(), gradients, totals.data(),
                    own_counts + 3, device.stream);
  return {totals.loss(), dlogps, dentropies, totals.sums(), totals.maxima()};
}

struct CudaPolicyLoss : PolicyLossFunction {
  static Inputs<ConstArray> arrays_of(const Inputs<Tensor>& tensors) {
    return device_arrays(tensors);
  }
  static std::vector<Tensor> run(const Call<CudaPolicyLoss>& call) {
    return policy_results(call, {});
  }
};

// With denominators that are on the device, as those that ranks have added up.
struct PolicyLossByCounts : CudaPolicyLoss {
  static constexpr std::string_view kName = "policy_loss_by_counts", kMore = "counts";

  static std::vector<Tensor> run(const Call<PolicyLossByCounts>& call) {
    return policy_results(call, call.more);
  }
};

struct CudaLocalCounts : LocalCountsFunction {
  static Inputs<ConstArray> arrays_of(const Inputs<Tensor>& tensors) {
    return device_arrays(tensors);
  }
  static std::vector<Tensor> run(const Call<CudaLocalCounts>& call) {
    const Tensor& logps = call.tensors.logps;
    const Tensor counts = new_doubles_on(logps, 3);
    const int64_t bytes = cuda::policy_workspace_bytes(call.arrays, call.options.objective);
    const Tensor memory = new_doubles_on(logps, (bytes + 7) / 8);
    const OnDevice device(kName, logps);
    cuda::local_counts(call.arrays, call.options.objective,
                       static_cast<double*>(counts.mutable_data_ptr()), memory.mutable_data_ptr(),
                       device.stream);
    return {counts};
  }
};

// ---- rows of logits -----------------------------------------------------------------------------

constexpr const char* kRows = "token_logps";

RowOptions row_options(const Words& words) {
  const RowOptions options = options_of<RowCall>(kRows, words).options();
  require(options.sums != RowSums::all,
          [] { return "token_logps: statistics must be false on a CUDA device, got true"; });
  return options;
}

// RowState of each row, in memory of the size of the CPU's RowStatistics.
cuda::RowState* states_in(const Tensor& statistics, int64_t rows) {
  static_assert(sizeof(cuda::RowState) <= sizeof(RowStatistics));
  return reinterpret_cast<cuda::RowState*>(rows_in<RowStatistics>(kRows, statistics, rows));
}

void check_support(const std::optional<Tensor>& support) {
  require(!support, [] { return "token_logps: support must be None on a CUDA device, got one"; });
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(const Tensor& logits, const Tensor& targets,
                                                       const std::optional<Tensor>& support,
                                                       const Names& option_names,
                                                       const Tensor& option_values,
                                                       const Names& choice_names,
                                                       const Names& choice_values) {
  return with_public_errors([&] {
    check_support(support);
    const RowOptions options =
        row_options({option_names, option_values, choice_names, choice_values});
    Tensor owner;
    const ConstLogits rows = rows_of(kRows, "logits", logits, owner);
    const int64_t* ids = ids_of(kRows, "targets", targets, rows.rows);
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.pop_back();
    const auto numbers = [&](bool wanted) {
      return torch::stable::new_empty(logits, wanted ? sizes : std::vector<int64_t>{0},
                                      ScalarType::Float);
    };
    const bool bonus = options.sums == RowSums::entropy;
    const Tensor logps = numbers(true), entropies = numbers(bonus);
    const Tensor statistics =
        torch::stable::new_empty(logits, {rows.rows, kStatistics}, ScalarType::Double);
    const OnDevice device(kRows, logits);
    cuda::row_statistics(
        rows, ids, options,
        {.states = states_in(statistics, rows.rows),
         .logps = static_cast<float*>(logps.mutable_data_ptr()),
         .entropies = bonus ? static_cast<float*>(entropies.mutable_data_ptr()) : nullptr},
        device.stream);
    return std::tuple(logps, entropies, statistics);
  });
}

const float* upstream_of(std::string_view name, const Maybe& tensor, int64_t rows) {
  if (!tensor) return nullptr;
  require(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
              tensor->numel() == rows,
          [&] {
            return named(kRows, name) + " must be " + text(rows) + " float32 numbers side by side";
          });
  return static_cast<const float*>(tensor->const_data_ptr());
}

void token_logps_backward(const Tensor& logits, const Tensor& targets, const Maybe& support,
                          const Tensor& statistics, const Maybe& dlogps, const Maybe& dentropies,
                          const Names& option_names, const Tensor& option_values,
                          const Names& choice_names, const Names& choice_values, Tensor dlogits) {
  with_public_errors([&] {
    check_support(support);
    const RowOptions options =
        row_options({option_names, option_values, choice_names, choice_values});
    Tensor owner;
    const ConstLogits rows = rows_of(kRows, "logits", logits, owner);
    const int64_t* ids = ids_of(kRows, "targets", targets, rows.rows);
    const OnDevice device(kRows, logits);
    cuda::row_gradients(rows, ids, options, states_in(statistics, rows.rows),
                        upstream_of("dlogps", dlogps, rows.rows),
                        upstream_of("dentropies", dentropies, rows.rows),
                        writable(kRows, dlogits, logits), device.stream);
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(tether::python::Operator<tether::PolicyLossByCounts>::schema().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("policy_loss_by_counts",
               &tether::python::Operator<tether::PolicyLossByCounts>::boxed);
  library.impl("policy_loss", &tether::python::Operator<tether::CudaPolicyLoss>::boxed);
  library.impl("local_counts", &tether::python::Operator<tether::CudaLocalCounts>::boxed);
  library.impl("token_logps_forward", TORCH_BOX(&tether::token_logps_forward));
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
}
