// The operators of python/tether/logits.py (see ops.cc about the ABI). Python has checked shapes
// and dtypes; ids are int64 and contiguous, as are statistics and upstream gradients in float64.

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
#include "logits/pair_kl.h"
#include "logits/rows.h"
#include "logits/vocabulary_shards.h"
#include "python/logits_rows.h"
#include "python/stable.h"

namespace tether {
namespace {

using namespace python;
using Upstream = std::optional<Tensor>;

constexpr int64_t kKlStatistics = sizeof(KlStatistics) / sizeof(double);

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
      const ShardHeader header = shard_header(options, in.vocabulary, wanted, in.rows);
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
    require(face::same_shape(q, p),
            [] { return "categorical_kl: p_logits must be like q_logits"; });
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
    require(face::same_shape(q, p),
            [] { return "categorical_kl: p_logits must be like q_logits"; });
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
      "row_options_check(str function, float temperature, float scale, float softcap) -> bool");
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
  library.impl("token_logps_backward", TORCH_BOX(&tether::token_logps_backward));
  library.impl("categorical_kl_forward", TORCH_BOX(&tether::categorical_kl_forward));
  library.impl("categorical_kl_backward", TORCH_BOX(&tether::categorical_kl_backward));
}

STABLE_TORCH_LIBRARY_IMPL(tether, CompositeExplicitAutograd, library) {
  library.impl("row_options_check", TORCH_BOX(&tether::row_options_check));
}
