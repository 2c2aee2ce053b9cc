// The operators of python/tether/logits.py and top_k.py (see ops.cc about the ABI). Python has
// checked shapes and dtypes; ids are int64 and contiguous, as are statistics, upstream gradients
// and log-probabilities of a head in float64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/rows.h"
#include "core/vocabulary_shards.h"
#include "estimators/logits_kl.h"
#include "estimators/top_k_kl.h"
#include "python/stable.h"

namespace tether {
namespace {

using python::contiguous;
using python::Name;
using python::numbers_of;
using python::same_shape;
using python::torch_executor;
using python::with_public_errors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Upstream = std::optional<Tensor>;

// Numbers of a row in a float64 tensor [N, ...].
constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
constexpr int64_t kKlStatistics = sizeof(KlStatistics) / sizeof(double);

ConstLogits layout_of(std::string_view function, std::string_view name, const Tensor& logits) {
  require(logits.dim() >= 1 && logits.size(-1) >= 1, [&] {
    return std::string(function) + ": " + std::string(name) + " must be [..., V] with V at least 1";
  });
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    sizes.push_back(logits.size(d));
    strides.push_back(logits.stride(d));
  }
  ConstLogits rows = strided_rows(sizes.data(), strides.data(), logits.dim());
  rows.dtype = python::dtype_of(function, name, logits);
  return rows;
}

// The rows of the logits or, for the rare layouts that need it, of a copy, which `owner` holds.
ConstLogits rows_of(std::string_view function, std::string_view name, const Tensor& logits,
                    Tensor& owner) {
  const bool express = layout_of(function, name, logits).vocabulary != 0;
  owner = express ? logits : torch::stable::contiguous(logits);
  ConstLogits rows = layout_of(function, name, owner);
  rows.data = owner.const_data_ptr();
  return rows;
}

// Rows for the gradient of `logits`.
MutableLogits writable(std::string_view function, const Tensor& dlogits, const Tensor& logits) {
  const ConstLogits rows = layout_of(function, "dlogits", dlogits);
  require(same_shape(dlogits, logits) && dlogits.scalar_type() == logits.scalar_type() &&
              rows.vocabulary != 0,
          [&] { return std::string(function) + ": dlogits must be like logits, in rows"; });
  return {dlogits.mutable_data_ptr(),
          rows.dtype,
          rows.rows,
          rows.vocabulary,
          rows.row_stride,
          rows.stride,
          rows.columns,
          rows.batch_stride};
}

int64_t count_of_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) rows *= logits.size(d);
  return rows;
}

const int64_t* ids_of(std::string_view function, std::string_view name, const Tensor& ids,
                      int64_t count) {
  return numbers_of<const int64_t>(function, name, ids, count);
}

// The statistics of `rows` rows.
template <class Row>
Row* rows_in(std::string_view function, const Tensor& statistics, int64_t rows) {
  constexpr int64_t kNumbers = sizeof(Row) / sizeof(double);
  numbers_of<const double>(function, "statistics", statistics, rows * kNumbers);
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

// Throws unless the options are legal: for devices without a kernel.
bool row_options_check(const Name& function, double temperature, double scale, double softcap) {
  return with_public_errors([&] {
    check_fields(function.text, row_options(temperature, scale, softcap, 0));
    return true;
  });
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

RowSums asked_sums(bool with_entropies, bool with_statistics) {
  return with_statistics ? RowSums::all : with_entropies ? RowSums::entropy : RowSums::logp;
}

// logps, entropies and the statistics themselves.
std::tuple<Tensor, Tensor, Tensor> results_of(const Tensor& statistics, const Tensor& logits,
                                              const RowOptions& options, bool with_entropies) {
  const RowStatistics* rows =
      rows_in<RowStatistics>("token_logps", statistics, count_of_rows(logits));
  const auto logp_of = [&](const RowStatistics& row) { return logp(row, options); };
  return {from_rows(rows, logits, logp_of),
          with_entropies ? from_rows(rows, logits, entropy)
                         : torch::stable::empty({0}, ScalarType::Float),
          statistics};
}

// Of the columns of the ids [first_id, first_id + V) of `ids`, behind their header; ids 0: of all,
// and no header.
Tensor shard_statistics(const Tensor& logits, const Tensor& targets, double temperature,
                        double scale, double softcap, int64_t ignore_index, bool with_entropies,
                        bool with_statistics, int64_t first_id, int64_t ids) {
  return with_public_errors([&] {
    Tensor owner;
    const ConstLogits in = rows_of("token_logps", "logits", logits, owner);
    const int64_t* wanted = ids_of("token_logps", "targets", targets, in.rows);
    RowOptions options = row_options(temperature, scale, softcap, ignore_index);
    options.sums = asked_sums(with_entropies, with_statistics);
    options.first_id = first_id;
    options.ids = ids;
    const int64_t headers = ids > 0 ? 1 : 0;
    const Tensor block = torch::stable::empty({headers + in.rows, kStatistics}, ScalarType::Double);
    RowStatistics* rows = rows_in<RowStatistics>("token_logps", block, headers + in.rows) + headers;
    row_statistics(in, wanted, options, rows, torch_executor());
    clear_unasked(options.sums, rows, in.rows);
    if (headers > 0) {
      const ShardHeader header = shard_header(options, in.vocabulary);
      std::memcpy(block.mutable_data_ptr(), &header, sizeof(header));
    }
    return block;
  });
}

// blocks: [shards, 1 + N, 8], what shard_statistics gave each rank.
std::tuple<Tensor, Tensor, Tensor> token_logps_of_shards(
    const Tensor& blocks, const Tensor& targets, const Tensor& logits, double temperature,
    double scale, double softcap, int64_t ignore_index, bool with_entropies) {
  return with_public_errors([&] {
    const auto function = "token_logps";
    const RowOptions options = row_options(temperature, scale, softcap, ignore_index);
    const int64_t rows = count_of_rows(logits), shards = blocks.dim() > 0 ? blocks.size(0) : 0;
    require(shards >= 1, [] { return "token_logps: blocks must be those of a shard at least"; });
    const Tensor merged = torch::stable::empty({rows, kStatistics}, ScalarType::Double);
    merge_shards(function, rows_in<RowStatistics>(function, blocks, shards * (1 + rows)), shards,
                 rows, ids_of(function, "targets", targets, rows), options,
                 rows_in<RowStatistics>(function, merged, rows));
    return results_of(merged, logits, options, with_entropies);
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(const Tensor& logits, const Tensor& targets,
                                                       double temperature, double scale,
                                                       double softcap, int64_t ignore_index,
                                                       bool with_entropies, bool with_statistics) {
  const Tensor statistics = shard_statistics(logits, targets, temperature, scale, softcap,
                                             ignore_index, with_entropies, with_statistics, 0, 0);
  return results_of(statistics, logits, row_options(temperature, scale, softcap, ignore_index),
                    with_entropies);
}

// inputs: the logits or the hidden states, for their shape and type; target_is_largest is 0 or 1.
std::tuple<Tensor, Tensor, Tensor> token_statistics(const Tensor& statistics, const Tensor& inputs,
                                                    double temperature, double scale,
                                                    double softcap) {
  return with_public_errors([&] {
    const RowOptions options = row_options(temperature, scale, softcap, 0);
    const RowStatistics* rows =
        rows_in<RowStatistics>("token_logps", statistics, count_of_rows(inputs));
    const auto mean_of = [&](const RowStatistics& row) { return mean_logit(row, options); };
    return std::tuple(from_rows(rows, inputs, sum_of_squared_p), from_rows(rows, inputs, mean_of),
                      from_rows(rows, inputs, target_is_largest));
  });
}

const double* numbers_or_none(std::string_view function, std::string_view name,
                              const Upstream& upstream, int64_t count) {
  return upstream ? numbers_of<const double>(function, name, *upstream, count) : nullptr;
}

void token_logps_backward(const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                          const Upstream& dlogps, const Upstream& dentropies, double temperature,
                          double scale, double softcap, int64_t ignore_index, Tensor dlogits,
                          int64_t first_id, int64_t ids) {
  with_public_errors([&] {
    // In place where it is asked for: then the layout is one that rows express.
    Tensor owner;
    RowOptions options = row_options(temperature, scale, softcap, ignore_index);
    options.first_id = first_id;
    options.ids = ids;
    const auto function = "token_logps";
    const ConstLogits in = rows_of(function, "logits", logits, owner);
    row_gradients(in, ids_of(function, "targets", targets, in.rows), options,
                  rows_in<RowStatistics>(function, statistics, in.rows),
                  numbers_or_none(function, "dlogps", dlogps, in.rows),
                  numbers_or_none(function, "dentropies", dentropies, in.rows),
                  writable(function, dlogits, logits), torch_executor());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> categorical_kl_forward(const Tensor& q, const Tensor& p,
                                                                  const std::optional<Tensor>& mask,
                                                                  double temperature) {
  return with_public_errors([&] {
    const auto function = "categorical_kl";
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(function, "q_logits", q, q_owner);
    const ConstLogits p_rows = rows_of(function, "p_logits", p, p_owner);
    const std::optional<Tensor> active = contiguous(mask);
    require(same_shape(q, p), [] { return "categorical_kl: p_logits must be like q_logits"; });
    require(
        !active || (active->scalar_type() == ScalarType::Bool && active->numel() == q_rows.rows),
        [] { return "categorical_kl: mask must be bool, one for each row"; });
    const Tensor statistics =
        torch::stable::empty({q_rows.rows, kKlStatistics}, ScalarType::Double);
    auto* sums = rows_in<KlStatistics>(function, statistics, q_rows.rows);
    logits_kl_statistics(q_rows, p_rows, temperature,
                         active ? static_cast<const uint8_t*>(active->const_data_ptr()) : nullptr,
                         sums, torch_executor());
    const auto values = [&](double LogitsKl::* member) {
      return from_rows(sums, q, [&](const KlStatistics& row) { return logits_kl(row).*member; });
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
    const auto function = "categorical_kl";
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(function, "q_logits", q, q_owner);
    const ConstLogits p_rows = rows_of(function, "p_logits", p, p_owner);
    require(same_shape(q, p), [] { return "categorical_kl: p_logits must be like q_logits"; });
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < q.dim(); ++d) sizes.push_back(q.size(d));
    const auto memory = [&](bool wanted) {
      return torch::stable::empty(wanted ? sizes : std::vector<int64_t>{0}, q.scalar_type());
    };
    const Tensor dq = memory(with_q), dp = memory(with_p);
    static_assert(sizeof(LogitsKl) == 3 * sizeof(double));
    numbers_of<const double>(function, "upstream", upstream, 3 * q_rows.rows);
    logits_kl_gradients(q_rows, p_rows, temperature,
                        rows_in<KlStatistics>(function, statistics, q_rows.rows),
                        static_cast<const LogitsKl*>(upstream.const_data_ptr()),
                        with_q ? writable(function, dq, q) : MutableLogits{},
                        with_p ? writable(function, dp, q) : MutableLogits{}, torch_executor());
    return std::tuple(dq, dp);
  });
}

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

TopKKlOptions top_k_options(double temperature, int64_t tail, int64_t ignore_index,
                            double precision) {
  return {.temperature = temperature,
          .tail = static_cast<TailEstimate>(tail),
          .ignore_index = ignore_index,
          .precision = precision};
}

std::tuple<Tensor, Tensor> top_k_kl_forward(const Tensor& q, const Tensor& ids, const Tensor& logps,
                                            const Upstream& targets, const Upstream& target_logps,
                                            double temperature, int64_t tail, int64_t ignore_index,
                                            double precision) {
  return with_public_errors([&] {
    Tensor owner;
    const ConstLogits rows = rows_of("top_k_kl", "q_logits", q, owner);
    const Tensor statistics = torch::stable::empty({rows.rows, kStatistics}, ScalarType::Double);
    std::vector<double> kl(static_cast<size_t>(rows.rows));
    RowStatistics* sums = rows_in<RowStatistics>("top_k_kl", statistics, rows.rows);
    top_k_kl(heads_of(rows, ids, logps, targets, target_logps),
             top_k_options(temperature, tail, ignore_index, precision), sums, kl.data(),
             torch_executor());
    clear_unasked(RowSums::logp, sums, rows.rows);
    return std::tuple(from_rows(kl.data(), q, [](double value) { return value; }), statistics);
  });
}

Tensor top_k_kl_backward(const Tensor& q, const Tensor& ids, const Tensor& logps,
                         const Upstream& targets, const Upstream& target_logps,
                         const Tensor& statistics, const Tensor& upstream, double temperature,
                         int64_t tail, int64_t ignore_index, double precision) {
  return with_public_errors([&] {
    Tensor owner;
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < q.dim(); ++d) sizes.push_back(q.size(d));
    const Tensor dq = torch::stable::empty(sizes, q.scalar_type());
    const auto function = "top_k_kl";
    const ConstLogits rows = rows_of(function, "q_logits", q, owner);
    top_k_kl_gradients(heads_of(rows, ids, logps, targets, target_logps),
                       top_k_options(temperature, tail, ignore_index, precision),
                       rows_in<RowStatistics>(function, statistics, rows.rows),
                       numbers_of<const double>(function, "upstream", upstream, rows.rows),
                       writable(function, dq, q), torch_executor());
    return dq;
  });
}

// Throws unless the options are legal: for devices without a kernel.
bool top_k_options_check(double temperature, double precision) {
  return with_public_errors([&] {
    check_fields("top_k_kl", top_k_options(temperature, 0, 0, precision));
    return true;
  });
}

// ids: [N, k] int64, contiguous; the result is [N, k], float64.
Tensor head_logps(const Tensor& logits, const Tensor& ids, double temperature) {
  return with_public_errors([&] {
    Tensor owner;
    const ConstLogits rows = rows_of("head_logps", "logits", logits, owner);
    const RowOptions options{.temperature = temperature, .sums = RowSums::logp};
    require(ids.dim() >= 1, [] { return "head_logps: head_ids must be [N, k]"; });
    const auto* wanted = ids_of("head_logps", "head_ids", ids, rows.rows * ids.size(-1));
    std::vector<RowStatistics> statistics(static_cast<size_t>(rows.rows));
    const Tensor out = torch::stable::empty({rows.rows, ids.size(-1)}, ScalarType::Double);
    row_statistics(rows, nullptr, options, statistics.data(), torch_executor());
    row_logps(rows, statistics.data(), wanted, ids.size(-1), options,
              static_cast<double*>(out.mutable_data_ptr()), torch_executor());
    return out;
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
      "Tensor(a!) dlogits, int first_id=0, int ids=0) -> ()");
  library.def(
      "shard_statistics(Tensor logits, Tensor targets, float temperature, float scale, "
      "float softcap, int ignore_index, bool with_entropies, bool with_statistics, int first_id, "
      "int ids) -> Tensor");
  library.def(
      "token_logps_of_shards(Tensor blocks, Tensor targets, Tensor logits, float temperature, "
      "float scale, float softcap, int ignore_index, bool with_entropies) -> "
      "(Tensor logps, Tensor entropies, Tensor statistics)");
  library.def(
      "top_k_kl_forward(Tensor q_logits, Tensor head_ids, Tensor head_logps, Tensor? targets, "
      "Tensor? target_logps, float temperature, int tail, int ignore_index, float precision) -> "
      "(Tensor kl, Tensor statistics)");
  library.def(
      "top_k_kl_backward(Tensor q_logits, Tensor head_ids, Tensor head_logps, Tensor? targets, "
      "Tensor? target_logps, Tensor statistics, Tensor upstream, float temperature, int tail, "
      "int ignore_index, float precision) -> Tensor");
  library.def(
      "row_options_check(str function, float temperature, float scale, float softcap) -> bool");
  library.def("top_k_options_check(float temperature, float precision) -> bool");
  library.def("head_logps(Tensor logits, Tensor head_ids, float temperature) -> Tensor");
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
  library.impl("shard_statistics", TORCH_BOX(&tether::shard_statistics));
  library.impl("token_logps_of_shards", TORCH_BOX(&tether::token_logps_of_shards));
  library.impl("top_k_kl_forward", TORCH_BOX(&tether::top_k_kl_forward));
  library.impl("top_k_kl_backward", TORCH_BOX(&tether::top_k_kl_backward));
  library.impl("head_logps", TORCH_BOX(&tether::head_logps));
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
  library.impl("categorical_kl_forward", TORCH_BOX(&tether::categorical_kl_forward));
  library.impl("categorical_kl_backward", TORCH_BOX(&tether::categorical_kl_backward));
}

STABLE_TORCH_LIBRARY_IMPL(tether, CompositeExplicitAutograd, library) {
  library.impl("row_options_check", TORCH_BOX(&tether::row_options_check));
  library.impl("top_k_options_check", TORCH_BOX(&tether::top_k_options_check));
}
