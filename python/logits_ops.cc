// The operators of python/tether/logits.py (see ops.cc about the ABI). Python has checked shapes
// and dtypes; targets are int64, contiguous, as are statistics and upstream gradients in float64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/rows.h"
#include "estimators/logits_kl.h"
#include "python/stable.h"

namespace tether {
namespace {

using python::contiguous;
using python::torch_executor;
using python::with_public_errors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Upstream = std::optional<Tensor>;

// Numbers of a row in a float64 tensor [N, ...].
constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
constexpr int64_t kKlStatistics = sizeof(KlStatistics) / sizeof(double);

ConstLogits layout_of(const Tensor& logits) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    sizes.push_back(logits.size(d));
    strides.push_back(logits.stride(d));
  }
  ConstLogits rows = strided_rows(sizes.data(), strides.data(), logits.dim());
  rows.dtype = python::dtype_of("token_logps", "logits", logits);
  return rows;
}

// The rows of the logits or, for the rare layouts that need it, of a copy, which `owner` holds.
ConstLogits rows_of(const Tensor& logits, Tensor& owner) {
  owner = layout_of(logits).vocabulary == 0 ? torch::stable::contiguous(logits) : logits;
  ConstLogits rows = layout_of(owner);
  rows.data = owner.const_data_ptr();
  return rows;
}

MutableLogits writable(const Tensor& logits) {
  const ConstLogits rows = layout_of(logits);
  return {logits.mutable_data_ptr(), rows.dtype,  rows.rows,    rows.vocabulary,
          rows.row_stride,           rows.stride, rows.columns, rows.batch_stride};
}

const int64_t* ids_of(const Tensor& targets) {
  return static_cast<const int64_t*>(targets.const_data_ptr());
}

template <class Row>
Row* rows_in(const Tensor& statistics) {
  return static_cast<Row*>(statistics.mutable_data_ptr());
}

// value(row) for each row, in the shape of `like`, float64 for float64 logits, else float32.
template <class Row, class Value>
Tensor from_rows(const Row* rows, const Tensor& logits, Value value) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) sizes.push_back(logits.size(d));
  const Tensor out = torch::stable::empty(sizes, wide ? ScalarType::Double : ScalarType::Float);
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (wide) {
      static_cast<double*>(out.mutable_data_ptr())[i] = value(rows[i]);
    } else {
      static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(value(rows[i]));
    }
  }
  return out;
}

RowOptions row_options(double temperature, double scale, double softcap, int64_t ignore_index) {
  return {
      .temperature = temperature, .scale = scale, .softcap = softcap, .ignore_index = ignore_index};
}

// What was not asked for is NaN, which opcheck and detectors of NaN would find in the output.
void clear_unasked(RowSums asked, RowStatistics* rows, int64_t count) {
  for (RowStatistics* row = rows; row < rows + count; ++row) {
    if (asked == RowSums::logp) row->weighted_sum = 0;
    if (asked != RowSums::all) {
      row->sum_of_squares = row->logit_sum = row->columns = row->max_logit = 0;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(const Tensor& logits, const Tensor& targets,
                                                       double temperature, double scale,
                                                       double softcap, int64_t ignore_index,
                                                       bool with_entropies, bool with_statistics) {
  return with_public_errors([&] {
    Tensor owner;
    RowOptions options = row_options(temperature, scale, softcap, ignore_index);
    options.sums = with_statistics  ? RowSums::all
                   : with_entropies ? RowSums::entropy
                                    : RowSums::logp;
    const Tensor statistics =
        torch::stable::empty({targets.numel(), kStatistics}, ScalarType::Double);
    RowStatistics* rows = rows_in<RowStatistics>(statistics);
    row_statistics(rows_of(logits, owner), ids_of(targets), options, rows, torch_executor());
    clear_unasked(options.sums, rows, targets.numel());
    const auto logp_of = [&](const RowStatistics& row) { return logp(row, options); };
    return std::tuple(from_rows(rows, logits, logp_of),
                      with_entropies ? from_rows(rows, logits, entropy)
                                     : torch::stable::empty({0}, ScalarType::Float),
                      statistics);
  });
}

// inputs: the logits or the hidden states, for their shape and type; target_is_largest is 0 or 1.
std::tuple<Tensor, Tensor, Tensor> token_statistics(const Tensor& statistics, const Tensor& inputs,
                                                    double temperature, double scale,
                                                    double softcap) {
  const RowOptions options = row_options(temperature, scale, softcap, 0);
  const RowStatistics* rows = rows_in<RowStatistics>(statistics);
  const auto mean_of = [&](const RowStatistics& row) { return mean_logit(row, options); };
  return {from_rows(rows, inputs, sum_of_squared_p), from_rows(rows, inputs, mean_of),
          from_rows(rows, inputs, target_is_largest)};
}

// Of one argument, contiguous float64 or none.
const double* numbers_of(const Upstream& upstream) {
  return upstream ? static_cast<const double*>(upstream->const_data_ptr()) : nullptr;
}

void token_logps_backward(const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                          const Upstream& dlogps, const Upstream& dentropies, double temperature,
                          double scale, double softcap, int64_t ignore_index, Tensor dlogits) {
  with_public_errors([&] {
    // In place where it is asked for: then the layout is one that rows express.
    Tensor owner;
    row_gradients(rows_of(logits, owner), ids_of(targets),
                  row_options(temperature, scale, softcap, ignore_index),
                  rows_in<RowStatistics>(statistics), numbers_of(dlogps), numbers_of(dentropies),
                  writable(dlogits), torch_executor());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> categorical_kl_forward(const Tensor& q, const Tensor& p,
                                                                  const std::optional<Tensor>& mask,
                                                                  double temperature) {
  return with_public_errors([&] {
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(q, q_owner), p_rows = rows_of(p, p_owner);
    const std::optional<Tensor> active = contiguous(mask);
    const Tensor statistics =
        torch::stable::empty({q_rows.rows, kKlStatistics}, ScalarType::Double);
    logits_kl_statistics(q_rows, p_rows, temperature,
                         active ? static_cast<const uint8_t*>(active->const_data_ptr()) : nullptr,
                         rows_in<KlStatistics>(statistics), torch_executor());
    const auto values = [&](double LogitsKl::* member) {
      return from_rows(rows_in<KlStatistics>(statistics), q,
                       [&](const KlStatistics& row) { return logits_kl(row).*member; });
    };
    return std::tuple(values(&LogitsKl::kl), values(&LogitsKl::reverse_kl),
                      values(&LogitsKl::entropy), statistics);
  });
}

// upstream: [N, 3] float64, contiguous: of kl, reverse_kl, entropies.
std::tuple<Tensor, Tensor> categorical_kl_backward(const Tensor& q, const Tensor& p,
                                                   const Tensor& statistics, const Tensor& upstream,
                                                   double temperature, bool with_q, bool with_p) {
  return with_public_errors([&] {
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(q, q_owner), p_rows = rows_of(p, p_owner);
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < q.dim(); ++d) sizes.push_back(q.size(d));
    const auto memory = [&](bool wanted) {
      return torch::stable::empty(wanted ? sizes : std::vector<int64_t>{0}, q.scalar_type());
    };
    const Tensor dq = memory(with_q), dp = memory(with_p);
    static_assert(sizeof(LogitsKl) == 3 * sizeof(double));
    logits_kl_gradients(q_rows, p_rows, temperature, rows_in<KlStatistics>(statistics),
                        static_cast<const LogitsKl*>(upstream.const_data_ptr()),
                        with_q ? writable(dq) : MutableLogits{},
                        with_p ? writable(dp) : MutableLogits{}, torch_executor());
    return std::tuple(dq, dp);
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(
      "token_logps_forward(Tensor logits, Tensor targets, float temperature, float scale, "
      "float softcap, int ignore_index, bool with_entropies, bool with_statistics) -> "
      "(Tensor logps, Tensor entropies, Tensor statistics)");
  library.def(
      "token_statistics(Tensor statistics, Tensor inputs, float temperature, float scale, "
      "float softcap) -> "
      "(Tensor sum_of_squared_p, Tensor mean_logits, Tensor target_is_largest)");
  library.def(
      "token_logps_backward(Tensor logits, Tensor targets, Tensor statistics, Tensor? dlogps, "
      "Tensor? dentropies, float temperature, float scale, float softcap, int ignore_index, "
      "Tensor(a!) dlogits) -> ()");
  library.def(
      "categorical_kl_forward(Tensor q_logits, Tensor p_logits, Tensor? mask, float temperature) "
      "-> (Tensor kl, Tensor reverse_kl, Tensor entropies, Tensor statistics)");
  library.def(
      "categorical_kl_backward(Tensor q_logits, Tensor p_logits, Tensor statistics, "
      "Tensor upstream, float temperature, bool with_q, bool with_p) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("token_logps_forward", TORCH_BOX(&tether::token_logps_forward));
  library.impl("token_statistics", TORCH_BOX(&tether::token_statistics));
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
  library.impl("categorical_kl_forward", TORCH_BOX(&tether::categorical_kl_forward));
  library.impl("categorical_kl_backward", TORCH_BOX(&tether::categorical_kl_backward));
}
