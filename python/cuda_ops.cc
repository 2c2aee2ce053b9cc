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
#include "logits/support_cuda.h"
#include "python/cuda_arrays.h"
#include "python/logits_rows.h"
#include "python/on_device.h"
#include "python/row_functions.h"

namespace tether {
namespace {

using namespace python;
using Names = std::vector<Name>;

constexpr const char* kRows = "token_logps";

RowOptions row_options(const Words& words) { return options_of<RowCall>(kRows, words).options(); }

// RowState of each row, [N, 7] in float32.
constexpr int64_t kStates = sizeof(cuda::RowState) / sizeof(float);
cuda::RowState* states_in(const Tensor& statistics, int64_t rows) {
  numbers_of<const float>(kRows, "statistics", statistics, rows * kStates);
  return static_cast<cuda::RowState*>(statistics.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(const Tensor& logits, const Tensor& targets,
                                                       const std::optional<Tensor>& support,
                                                       const Names& option_names,
                                                       const Tensor& option_values,
                                                       const Names& choice_names,
                                                       const Names& choice_values) {
  return with_public_errors([&] {
    const RowOptions options =
        row_options({option_names, option_values, choice_names, choice_values});
    Tensor owner;
    const ConstLogits rows = rows_of(kRows, "logits", logits, owner);
    const int64_t* ids = ids_of(kRows, "targets", targets, rows.rows);
    const auto kept = kept_ids(kRows, support, rows.rows);
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.pop_back();
    const auto numbers = [&](bool wanted) {
      return torch::stable::new_empty(logits, wanted ? sizes : std::vector<int64_t>{0},
                                      ScalarType::Float);
    };
    const bool bonus = options.sums != RowSums::logp;
    const Tensor logps = numbers(true), entropies = numbers(bonus);
    const Tensor statistics =
        torch::stable::new_empty(logits, {rows.rows, kStates}, ScalarType::Float);
    const cuda::RowResults results{
        .states = states_in(statistics, rows.rows),
        .logps = static_cast<float*>(logps.mutable_data_ptr()),
        .entropies = bonus ? static_cast<float*>(entropies.mutable_data_ptr()) : nullptr};
    const OnDevice device(kRows, logits);
    if (kept) {
      cuda::support_statistics(rows, ids, *kept, options, results, device.stream);
    } else {
      cuda::row_statistics(rows, ids, options, results, device.stream);
    }
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
    const RowOptions options =
        row_options({option_names, option_values, choice_names, choice_values});
    Tensor owner;
    const ConstLogits rows = rows_of(kRows, "logits", logits, owner);
    const int64_t* ids = ids_of(kRows, "targets", targets, rows.rows);
    const auto kept = kept_ids(kRows, support, rows.rows);
    const cuda::RowState* states = states_in(statistics, rows.rows);
    const float* of_logps = upstream_of("dlogps", dlogps, rows.rows);
    const float* of_entropies = upstream_of("dentropies", dentropies, rows.rows);
    const MutableLogits out = writable(kRows, dlogits, logits);
    const Tensor memory = memory_of_kept(support, logits, 1);
    const OnDevice device(kRows, logits);
    if (kept) {
      cuda::support_gradients(rows, ids, *kept, options, states, of_logps, of_entropies,
                              static_cast<float*>(memory.mutable_data_ptr()), out, device.stream);
    } else {
      cuda::row_gradients(rows, ids, options, states, of_logps, of_entropies, out, device.stream);
    }
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("token_logps_forward", TORCH_BOX(&tether::token_logps_forward));
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
}
