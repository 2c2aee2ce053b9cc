// The operators of the Python package that have kernels on CUDA devices (see ops.cc about the ABI):
// with the other cuda_*.cc a library of its own, beside libtether_ops.so, whose schemas it takes.
// It loads without a driver and with a torch without CUDA, where nothing ever calls it. Here: those
// on rows of logits.

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
#include "python/logits_rows.h"
#include "python/on_device.h"
#include "python/row_functions.h"

namespace tether {
namespace {

using namespace python;
using Names = std::vector<Name>;

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
  return tensor ? numbers_of<const float>(kRows, name, *tensor, rows) : nullptr;
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

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("token_logps_forward", TORCH_BOX(&tether::token_logps_forward));
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
}
