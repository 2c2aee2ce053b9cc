// The operator of a chunk of logits in linear_policy_loss (see ops.cc about the ABI).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "python/functions.h"
#include "python/logits_rows.h"
#include "python/loss_functions.h"
#include "python/row_functions.h"
#include "python/stable.h"
#include "rl/kernels/chunked_policy_loss.h"

namespace tether {
namespace {

using namespace python;
using Maybe = std::optional<Tensor>;

constexpr std::string_view kFunction = "linear_policy_loss";

// Throws unless the places of tokens ascend within [0, size).
void check_places(const int64_t* places, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    require((i == 0 ? 0 : places[i - 1] + 1) <= places[i] && places[i] < size, [&] {
      return named(kFunction, "places") + " must ascend within [0, " + text(size) + "), got " +
             text(places[i]) + " at " + in_brackets(text(i));
    });
  }
}

// The part of a chunk of logits [C, V] in the loss of a batch, whose logps they are at `places`:
// see rl/kernels/chunked_policy_loss.h. logits: contiguous; with a gradient they become it. The two
// results in the middle are [C] in float64.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_of_logits(
    Tensor logits, const Tensor& targets, const Tensor& places, const Tensor& advantages,
    const Tensor& response_mask, const Maybe& old_logps, const Maybe& ref_logps,
    const Maybe& rollout_logps, const Maybe& token_weights, const Maybe& kl_weights,
    const Maybe& entropy_weights, const Maybe& row_tokens, const Maybe& offsets,
    const std::vector<Name>& option_names, const Tensor& option_values,
    const std::vector<Name>& choice_names, const std::vector<Name>& choice_values,
    const std::vector<Name>& row_names, const Tensor& row_values,
    const std::vector<Name>& row_choice_names, const std::vector<Name>& row_choice_values,
    bool with_gradient) {
  return with_public_errors([&] {
    // Stands for the log-probabilities that are made here.
    const Tensor shape = torch::stable::empty(sizes_of(response_mask), logits.scalar_type());
    PolicyInputs<Tensor> batch{.logps = shape,
                               .advantages = advantages,
                               .response_mask = response_mask,
                               .old_logps = old_logps.value_or(Tensor()),
                               .ref_logps = ref_logps.value_or(Tensor()),
                               .rollout_logps = rollout_logps.value_or(Tensor()),
                               .token_weights = token_weights.value_or(Tensor()),
                               .kl_weights = kl_weights.value_or(Tensor()),
                               .entropy_weights = entropy_weights.value_or(Tensor()),
                               .row_tokens = row_tokens.value_or(Tensor()),
                               .offsets = contiguous(offsets).value_or(Tensor())};
    face::check_arguments(kFunction, batch);
    const auto options = options_of<PolicyOptions>(
        kFunction, {option_names, option_values, choice_names, choice_values});
    const bool wide = logits.scalar_type() == ScalarType::Double;
    ChunkedPolicyLoss loss(kFunction, face::arrays_of(kFunction, batch),
                           wide ? DType::float64 : DType::float32, options.objective,
                           options.normalizer, torch_executor());
    require(logits.dim() == 2 && logits.is_contiguous(),
            [] { return named(kFunction, "logits") + " must be [C, V] and contiguous"; });
    const MutableLogits rows{.data = logits.mutable_data_ptr(),
                             .dtype = dtype_of(logits.scalar_type()),
                             .rows = logits.size(0),
                             .vocabulary = logits.size(1),
                             .row_stride = logits.size(1)};
    const RowOptions row_options =
        options_of<RowCall>(kFunction, {row_names, row_values, row_choice_names, row_choice_values})
            .options();
    const bool with_entropies = row_options.sums != RowSums::logp;
    const auto doubles = [&](bool wanted) {
      return torch::stable::empty({wanted ? logits.size(0) : 0}, ScalarType::Double);
    };
    const Tensor logps = doubles(true), entropies = doubles(with_entropies);
    const ConstLogits shape_of_rows{.rows = rows.rows, .vocabulary = rows.vocabulary};
    const auto* ids = targets_of(kFunction, targets, shape_of_rows, row_options);
    const auto* at = numbers_of<const int64_t>(kFunction, "places", places, rows.rows);
    check_places(at, rows.rows, response_mask.numel());
    const auto numbers = [](const Tensor& tensor) {
      return static_cast<double*>(tensor.mutable_data_ptr());
    };
    loss.add(rows, ids, at, row_options, with_gradient, numbers(logps),
             with_entropies ? numbers(entropies) : nullptr);
    const PolicyTotals& totals = loss.totals();
    return std::tuple(new_doubles({}, &totals.loss), logps, entropies,
                      new_doubles({PolicyMetrics::kSums, 2}, totals.metrics.sums.data()),
                      new_doubles({PolicyMetrics::kMaxima}, totals.metrics.maxima.data()));
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(tether::python::with_words(
                  "policy_loss_of_logits(Tensor(a!) logits, Tensor targets, Tensor places, "
                  "Tensor advantages, Tensor response_mask, Tensor? old_logps, Tensor? ref_logps, "
                  "Tensor? rollout_logps, Tensor? token_weights, Tensor? kl_weights, "
                  "Tensor? entropy_weights, Tensor? row_tokens, Tensor? offsets, WORDS, str[] "
                  "row_names, Tensor row_values, "
                  "str[] row_choice_names, str[] row_choice_values, bool with_gradient) -> "
                  "(Tensor loss, Tensor logps, Tensor entropies, Tensor metric_sums, "
                  "Tensor metric_maxima)")
                  .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("policy_loss_of_logits", TORCH_BOX(&tether::policy_loss_of_logits));
}
