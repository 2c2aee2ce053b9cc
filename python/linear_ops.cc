// The operator of a chunk of logits in linear_policy_loss (see ops.cc about the ABI).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
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

struct Chunk {
  Tensor logits, targets, places;
  PolicyInputs<Tensor> batch;
  Words words, row_words;
  bool with_gradient;

  explicit Chunk(Arguments arguments) {
    for (Tensor* each : {&logits, &targets, &places}) *each = arguments.next<Tensor>();
    arguments.arrays(batch, kOfLogits);
    words = arguments.words();
    row_words = arguments.words();
    with_gradient = arguments.next<bool>();
    // Stands for the log-probabilities that are made here.
    batch.logps = empty(sizes_of(batch.response_mask), logits.scalar_type());
  }

  MutableLogits rows() const {
    require(logits.dim() == 2 && logits.is_contiguous(),
            [] { return named(kFunction, "logits") + " must be [C, V] and contiguous"; });
    return {.data = logits.mutable_data_ptr(),
            .dtype = dtype_of(logits.scalar_type()),
            .rows = logits.size(0),
            .vocabulary = logits.size(1),
            .row_stride = logits.size(1)};
  }
};

// The part of a chunk of logits [C, V] in the loss of a batch, whose logps they are at `places`:
// see rl/kernels/chunked_policy_loss.h. logits: contiguous; with a gradient they become it. The two
// results in the middle are [C] in float64.
std::vector<Tensor> policy_loss_of(const Chunk& chunk) {
  face::check_arguments(kFunction, chunk.batch);
  const auto options = options_of<PolicyOptions>(kFunction, chunk.words);
  const bool wide = chunk.logits.scalar_type() == ScalarType::Double;
  ChunkedPolicyLoss loss(kFunction, face::arrays_of(kFunction, chunk.batch),
                         wide ? DType::float64 : DType::float32, options.objective,
                         options.normalizer, torch_executor());
  const MutableLogits rows = chunk.rows();
  const RowOptions row_options = options_of<RowCall>(kFunction, chunk.row_words).options();
  const bool with_entropies = row_options.sums != RowSums::logp;
  const auto doubles = [&](bool wanted) {
    return empty({wanted ? rows.rows : 0}, ScalarType::Double);
  };
  const Tensor logps = doubles(true), entropies = doubles(with_entropies);
  const ConstLogits shape_of_rows{.rows = rows.rows, .vocabulary = rows.vocabulary};
  const auto* ids = targets_of(kFunction, chunk.targets, shape_of_rows, row_options);
  const auto* at = numbers_of<const int64_t>(kFunction, "places", chunk.places, rows.rows);
  check_places(at, rows.rows, chunk.batch.response_mask.numel());
  const auto numbers = [](const Tensor& tensor) {
    return static_cast<double*>(tensor.mutable_data_ptr());
  };
  loss.add(rows, ids, at, row_options, chunk.with_gradient, numbers(logps),
           with_entropies ? numbers(entropies) : nullptr);
  const PolicyTotals& totals = loss.totals();
  return {new_doubles({}, &totals.loss), logps, entropies,
          new_doubles({PolicyMetrics::kSums, 2}, totals.metrics.sums.data()),
          new_doubles({PolicyMetrics::kMaxima}, totals.metrics.maxima.data())};
}

void policy_loss_of_logits(StableIValue* stack, uint64_t, uint64_t) {
  put_results(stack, with_public_errors([&] { return policy_loss_of(Chunk(Arguments(stack))); }));
}

std::string schema() {
  const std::string arrays = schema_of_arrays<PolicyInputs<Tensor>>(kOfLogits);
  return with_words(
      "policy_loss_of_logits(Tensor(a!) logits, Tensor targets, Tensor places, " + arrays +
      "WORDS, str[] row_names, Tensor row_values, str[] row_choice_names, str[] row_choice_values, "
      "bool with_gradient) -> (Tensor loss, Tensor logps, Tensor entropies, Tensor metric_sums, "
      "Tensor metric_maxima)");
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) { library.def(tether::schema().c_str()); }

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("policy_loss_of_logits", &tether::policy_loss_of_logits);
}
