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
#include "face/in_words_of.h"
#include "logits/pair_kl.h"
#include "logits/rows.h"
#include "logits/support.h"
#include "logits/vocabulary_shards.h"
#include "python/logits_rows.h"
#include "python/row_functions.h"
#include "python/stable.h"

namespace tether {
namespace {

using namespace python;
using Upstream = std::optional<Tensor>;
using Names = std::vector<Name>;

RowOptions row_options(std::string_view function, const Words& words) {
  return options_of<RowCall>(function, words).options();
}

// logps, entropies and the statistics themselves.
std::tuple<Tensor, Tensor, Tensor> results_of(const Tensor& statistics, const Tensor& logits,
                                              const RowOptions& options) {
  const RowStatistics* rows =
      rows_in<RowStatistics>("token_logps", statistics, count_of_rows(logits));
  const auto logp_of = [&](const RowStatistics& row) { return logp(row, options); };
  return {from_rows(rows, logits, logp_of),
          options.sums == RowSums::logp ? empty({0}, ScalarType::Float)
                                        : from_rows(rows, logits, entropy),
          statistics};
}

// Of the columns of the ids [first_id, first_id + V) of `ids`, behind their header; ids 0: of all,
// and no header.
Tensor statistics_of(const Tensor& logits, const Tensor& targets,
                     const std::optional<Tensor>& support, const RowOptions& options) {
  Tensor owner;
  const ConstLogits in = rows_of("token_logps", "logits", logits, owner);
  const int64_t* wanted = targets_of("token_logps", targets, in, options);
  const int64_t headers = options.ids > 0 ? 1 : 0;
  const Tensor block = empty({headers + in.rows, kStatistics}, ScalarType::Double);
  RowStatistics* rows = rows_in<RowStatistics>("token_logps", block, headers + in.rows) + headers;
  const std::optional<KeptIds> kept = kept_ids("token_logps", support, in.rows);
  if (kept) {
    const int64_t added = face::in_words_of("token_logps", "ids of support", [&] {
      return support_statistics(in, wanted, *kept, options, rows, nullptr, torch_executor());
    });
    require(added == 0,
            [] { return "token_logps: support must be made of the same targets, got others"; });
  } else {
    row_statistics(in, wanted, options, rows, torch_executor());
  }
  clear_unasked(options.sums, rows, in.rows);
  if (headers > 0) {
    const ShardHeader header =
        shard_header(options, in.vocabulary, wanted, in.rows, kept ? &*kept : nullptr);
    std::memcpy(block.mutable_data_ptr(), &header, sizeof(header));
  }
  return block;
}

Tensor shard_statistics(const Tensor& logits, const Tensor& targets,
                        const std::optional<Tensor>& support, const Names& option_names,
                        const Tensor& option_values, const Names& choice_names,
                        const Names& choice_values) {
  return with_public_errors([&] {
    return statistics_of(
        logits, targets, support,
        row_options("token_logps", {option_names, option_values, choice_names, choice_values}));
  });
}

// blocks: [shards, 1 + N, 8], what shard_statistics gave each rank.
std::tuple<Tensor, Tensor, Tensor> token_logps_of_shards(
    const Tensor& blocks, const Tensor& targets, const Tensor& logits, const Names& option_names,
    const Tensor& option_values, const Names& choice_names, const Names& choice_values) {
  return with_public_errors([&] {
    const auto function = "token_logps";
    const RowOptions options =
        row_options(function, {option_names, option_values, choice_names, choice_values});
    const int64_t rows = count_of_rows(logits), shards = blocks.dim() > 0 ? blocks.size(0) : 0;
    require(shards >= 1, [] { return "token_logps: blocks must be those of a shard at least"; });
    const Tensor merged = empty({rows, kStatistics}, ScalarType::Double);
    merge_shards(function, rows_in<RowStatistics>(function, blocks, shards * (1 + rows)), shards,
                 rows, ids_of(function, "targets", targets, rows), options,
                 rows_in<RowStatistics>(function, merged, rows));
    return results_of(merged, logits, options);
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(const Tensor& logits, const Tensor& targets,
                                                       const std::optional<Tensor>& support,
                                                       const Names& option_names,
                                                       const Tensor& option_values,
                                                       const Names& choice_names,
                                                       const Names& choice_values) {
  return with_public_errors([&] {
    const RowOptions options =
        row_options("token_logps", {option_names, option_values, choice_names, choice_values});
    return results_of(statistics_of(logits, targets, support, options), logits, options);
  });
}

// inputs: the logits or the hidden states, for their shape and type; target_is_largest is 0 or 1.
std::tuple<Tensor, Tensor, Tensor> token_statistics(const Tensor& statistics, const Tensor& inputs,
                                                    const Names& option_names,
                                                    const Tensor& option_values,
                                                    const Names& choice_names,
                                                    const Names& choice_values) {
  return with_public_errors([&] {
    const auto function = "token_logps";
    const RowOptions options =
        row_options(function, {option_names, option_values, choice_names, choice_values});
    const RowStatistics* rows = rows_in<RowStatistics>(function, statistics, count_of_rows(inputs));
    const auto mean_of = [&](const RowStatistics& row) { return mean_logit(row, options); };
    return std::tuple(from_rows(rows, inputs, sum_of_squared_p), from_rows(rows, inputs, mean_of),
                      from_rows(rows, inputs, target_is_largest));
  });
}

void token_logps_backward(const Tensor& logits, const Tensor& targets,
                          const std::optional<Tensor>& support, const Tensor& statistics,
                          const Upstream& dlogps, const Upstream& dentropies,
                          const Names& option_names, const Tensor& option_values,
                          const Names& choice_names, const Names& choice_values, Tensor dlogits) {
  with_public_errors([&] {
    // In place where it is asked for: then the layout is one that rows express.
    Tensor owner;
    const auto function = "token_logps";
    const RowOptions options =
        row_options(function, {option_names, option_values, choice_names, choice_values});
    const ConstLogits in = rows_of(function, "logits", logits, owner);
    const int64_t* ids = ids_of(function, "targets", targets, in.rows);
    const auto* rows = rows_in<RowStatistics>(function, statistics, in.rows);
    const double* dlogp = numbers_or_none(function, "dlogps", dlogps, in.rows);
    const double* dentropy = numbers_or_none(function, "dentropies", dentropies, in.rows);
    const MutableLogits out = writable(function, dlogits, logits);
    if (const auto kept = kept_ids(function, support, in.rows)) {
      return support_gradients(in, ids, *kept, options, rows, dlogp, dentropy, out,
                               torch_executor());
    }
    row_gradients(in, ids, options, rows, dlogp, dentropy, out, torch_executor());
  });
}

double temperature_of(std::string_view function, const Words& words) {
  return options_of<TemperatureCall>(function, words).temperature;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> categorical_kl_forward(
    const Tensor& q, const Tensor& p, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& support, const Names& option_names, const Tensor& option_values,
    const Names& choice_names, const Names& choice_values) {
  return with_public_errors([&] {
    const auto function = "categorical_kl";
    const double temperature =
        temperature_of(function, {option_names, option_values, choice_names, choice_values});
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(function, "q_logits", q, q_owner);
    const ConstLogits p_rows = rows_of(function, "p_logits", p, p_owner);
    const std::optional<Tensor> active = contiguous(mask);
    require(face::same_shape(q, p),
            [] { return "categorical_kl: p_logits must be like q_logits"; });
    require(
        !active || (active->scalar_type() == ScalarType::Bool && active->numel() == q_rows.rows),
        [] { return "categorical_kl: mask must be bool, one for each row"; });
    const Tensor statistics = empty({q_rows.rows, kKlStatistics}, ScalarType::Double);
    auto* sums = rows_in<KlStatistics>(function, statistics, q_rows.rows);
    const auto* is_active =
        active ? static_cast<const uint8_t*>(active->const_data_ptr()) : nullptr;
    if (const auto kept = kept_ids(function, support, q_rows.rows)) {
      face::in_words_of(function, "ids of support", [&] {
        support_kl_statistics(q_rows, p_rows, nullptr, *kept,
                              {.temperature = temperature, .active = is_active}, sums,
                              torch_executor());
      });
    } else {
      logits_kl_statistics(q_rows, p_rows, temperature, is_active, sums, torch_executor());
    }
    const auto values = [&](double LogitsKl::* member) {
      return from_rows(sums, q, [&](const KlStatistics& row) { return logits_kl(row).*member; });
    };
    return std::tuple(values(&LogitsKl::kl), values(&LogitsKl::reverse_kl),
                      values(&LogitsKl::entropy), statistics);
  });
}

// upstream: [N, 3] float64, contiguous: of kl, reverse_kl, entropies.
std::tuple<Tensor, Tensor> categorical_kl_backward(
    const Tensor& q, const Tensor& p, const std::optional<Tensor>& support,
    const Tensor& statistics, const Tensor& upstream, const Names& option_names,
    const Tensor& option_values, const Names& choice_names, const Names& choice_values, bool with_q,
    bool with_p) {
  return with_public_errors([&] {
    const auto function = "categorical_kl";
    const double temperature =
        temperature_of(function, {option_names, option_values, choice_names, choice_values});
    Tensor q_owner, p_owner;
    const ConstLogits q_rows = rows_of(function, "q_logits", q, q_owner);
    const ConstLogits p_rows = rows_of(function, "p_logits", p, p_owner);
    require(face::same_shape(q, p),
            [] { return "categorical_kl: p_logits must be like q_logits"; });
    const auto memory = [&](bool wanted) {
      return wanted ? new_like(q) : empty({0}, q.scalar_type());
    };
    const Tensor dq = memory(with_q), dp = memory(with_p);
    static_assert(sizeof(LogitsKl) == 3 * sizeof(double));
    numbers_of<const double>(function, "upstream", upstream, 3 * q_rows.rows);
    const auto* rows = rows_in<KlStatistics>(function, statistics, q_rows.rows);
    const auto* factors = static_cast<const LogitsKl*>(upstream.const_data_ptr());
    const MutableLogits dx = with_q ? writable(function, dq, q) : MutableLogits{},
                        dy = with_p ? writable(function, dp, q) : MutableLogits{};
    if (const auto kept = kept_ids(function, support, q_rows.rows)) {
      support_kl_gradients(q_rows, p_rows, nullptr, *kept, {.temperature = temperature}, rows,
                           factors, dx, dy, torch_executor());
    } else {
      logits_kl_gradients(q_rows, p_rows, temperature, rows, factors, dx, dy, torch_executor());
    }
    return std::tuple(dq, dp);
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(tether::python::with_words(
                  "token_logps_forward(Tensor logits, Tensor targets, Tensor? support, WORDS) -> "
                  "(Tensor logps, Tensor entropies, Tensor statistics)")
                  .c_str());
  library.def(tether::python::with_words(
                  "token_statistics(Tensor statistics, Tensor inputs, WORDS) -> "
                  "(Tensor sum_of_squared_p, Tensor mean_logits, Tensor target_is_largest)")
                  .c_str());
  library.def(
      tether::python::with_words(
          "token_logps_backward(Tensor logits, Tensor targets, Tensor? support, Tensor statistics, "
          "Tensor? dlogps, Tensor? dentropies, WORDS, Tensor(a!) dlogits) -> ()")
          .c_str());
  library.def(
      tether::python::with_words(
          "shard_statistics(Tensor logits, Tensor targets, Tensor? support, WORDS) -> Tensor")
          .c_str());
  library.def(tether::python::with_words(
                  "token_logps_of_shards(Tensor blocks, Tensor targets, Tensor logits, "
                  "WORDS) -> (Tensor logps, Tensor entropies, Tensor statistics)")
                  .c_str());
  library.def(tether::python::with_words(
                  "categorical_kl_forward(Tensor q_logits, Tensor p_logits, Tensor? mask, "
                  "Tensor? support, WORDS) "
                  "-> (Tensor kl, Tensor reverse_kl, Tensor entropies, Tensor statistics)")
                  .c_str());
  library.def(tether::python::with_words(
                  "categorical_kl_backward(Tensor q_logits, Tensor p_logits, Tensor? support, "
                  "Tensor statistics, Tensor upstream, WORDS, bool with_q, bool with_p) -> "
                  "(Tensor, Tensor)")
                  .c_str());
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
