// The operators of python/tether/top_k.py (see logits_ops.cc).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "face/in_words_of.h"
#include "logits/rows.h"
#include "logits/top_k_kl.h"
#include "python/logits_rows.h"
#include "python/row_functions.h"
#include "python/stable.h"

namespace tether {
namespace {

using namespace python;
using Upstream = std::optional<Tensor>;
using Names = std::vector<Name>;

// ids [N, k] and targets [N] int64, logps and target_logps float64, all contiguous.
TopKHeads heads_of(const ConstLogits& q, const Tensor& ids, const Tensor& logps,
                   const Upstream& targets, const Upstream& target_logps) {
  const auto function = "top_k_kl";
  require(ids.dim() >= 1, [] { return "top_k_kl: head_ids must be [..., k]"; });
  const int64_t size = ids.size(-1);
  return {.q = q,
          .size = size,
          .ids = ids_of(function, "head_ids", ids, q.rows * size),
          .p_logps = numbers_of<const double>(function, "head_logps", logps, q.rows * size),
          .targets = targets ? ids_of(function, "targets", *targets, q.rows) : nullptr,
          .p_target_logps = numbers_or_none(function, "target_logps", target_logps, q.rows)};
}

TopKKlOptions top_k_options(const Words& words) {
  return options_of<TopKCall>("top_k_kl", words).options();
}

std::tuple<Tensor, Tensor> top_k_kl_forward(const Tensor& q, const Tensor& ids, const Tensor& logps,
                                            const Upstream& targets, const Upstream& target_logps,
                                            const Names& option_names, const Tensor& option_values,
                                            const Names& choice_names, const Names& choice_values) {
  return with_public_errors([&] {
    Tensor owner;
    const ConstLogits rows = rows_of("top_k_kl", "q_logits", q, owner);
    const Tensor statistics = empty({rows.rows, kStatistics}, ScalarType::Double);
    std::vector<double> kl(static_cast<size_t>(rows.rows));
    RowStatistics* sums = rows_in<RowStatistics>("top_k_kl", statistics, rows.rows);
    top_k_kl(heads_of(rows, ids, logps, targets, target_logps),
             top_k_options({option_names, option_values, choice_names, choice_values}), sums,
             kl.data(), torch_executor());
    clear_unasked(RowSums::logp, sums, rows.rows);
    return std::tuple(from_rows(kl.data(), q, [](double value) { return value; }), statistics);
  });
}

Tensor top_k_kl_backward(const Tensor& q, const Tensor& ids, const Tensor& logps,
                         const Upstream& targets, const Upstream& target_logps,
                         const Tensor& statistics, const Tensor& upstream,
                         const Names& option_names, const Tensor& option_values,
                         const Names& choice_names, const Names& choice_values) {
  return with_public_errors([&] {
    Tensor owner;
    const Tensor dq = new_like(q);
    const auto function = "top_k_kl";
    const ConstLogits rows = rows_of(function, "q_logits", q, owner);
    top_k_kl_gradients(heads_of(rows, ids, logps, targets, target_logps),
                       top_k_options({option_names, option_values, choice_names, choice_values}),
                       rows_in<RowStatistics>(function, statistics, rows.rows),
                       numbers_of<const double>(function, "upstream", upstream, rows.rows),
                       writable(function, dq, q), torch_executor());
    return dq;
  });
}

// ids: [N, k] int64, contiguous; the result is [N, k], float64.
Tensor head_logps(const Tensor& logits, const Tensor& ids, const Names& option_names,
                  const Tensor& option_values, const Names& choice_names,
                  const Names& choice_values) {
  return with_public_errors([&] {
    Tensor owner;
    const ConstLogits rows = rows_of("head_logps", "logits", logits, owner);
    const auto call = options_of<TemperatureCall>(
        "head_logps", {option_names, option_values, choice_names, choice_values});
    const RowOptions options{.temperature = call.temperature, .sums = RowSums::logp};
    require(ids.dim() >= 1, [] { return "head_logps: head_ids must be [N, k]"; });
    const auto* wanted = ids_of("head_logps", "head_ids", ids, rows.rows * ids.size(-1));
    std::vector<RowStatistics> statistics(static_cast<size_t>(rows.rows));
    const Tensor out = empty({rows.rows, ids.size(-1)}, ScalarType::Double);
    face::in_words_of("head_logps", "head_ids", [&] {
      row_statistics(rows, nullptr, options, statistics.data(), torch_executor());
      row_logps(rows, statistics.data(), wanted, ids.size(-1), options,
                static_cast<double*>(out.mutable_data_ptr()), torch_executor());
    });
    return out;
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(tether::python::with_words(
                  "top_k_kl_forward(Tensor q_logits, Tensor head_ids, Tensor head_logps, "
                  "Tensor? targets, Tensor? target_logps, WORDS) -> "
                  "(Tensor kl, Tensor statistics)")
                  .c_str());
  library.def(tether::python::with_words(
                  "top_k_kl_backward(Tensor q_logits, Tensor head_ids, Tensor head_logps, "
                  "Tensor? targets, Tensor? target_logps, Tensor statistics, "
                  "Tensor upstream, WORDS) -> Tensor")
                  .c_str());
  library.def(
      tether::python::with_words("head_logps(Tensor logits, Tensor head_ids, WORDS) -> Tensor")
          .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("top_k_kl_forward", TORCH_BOX(&tether::top_k_kl_forward));
  library.impl("top_k_kl_backward", TORCH_BOX(&tether::top_k_kl_backward));
  library.impl("head_logps", TORCH_BOX(&tether::head_logps));
}
