#include "libtorch/linear_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/linear_checks.h"
#include "libtorch/logits_rows.h"
#include "libtorch/policy_batch.h"
#include "libtorch/stored_gradient.h"
#include "rl/kernels/policy_checks.h"

namespace tether {
namespace {

using detail::LinearGradient;
using detail::LinearSweep;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- one row, and pieces of it ------------------------------------------------------------------

// Tokens [first, last] of one row, as a batch of its own.
struct Piece {
  int64_t row, first, last;
};

template <class Byte>
BasicArray<Byte> piece_of(const BasicArray<Byte>& array, const RowLayout& layout,
                          const Piece& piece) {
  using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
  BasicArray<Byte> out = array;
  if (array) {
    const int64_t elements = array.index(layout, piece.row, piece.first);
    out.data = static_cast<Char*>(array.data) + elements * bytes_of(array.dtype);
  }
  return out;
}

PolicyArrays piece_of(const PolicyArrays& batch, const Piece& piece) {
  const auto of = [&](const ConstArray& array) { return piece_of(array, batch.layout, piece); };
  return {.layout = {.rows = 1, .columns = piece.last - piece.first + 1},
          .logps = of(batch.logps),
          .advantages = of(batch.advantages),
          .response_mask = of(batch.response_mask),
          .old_logps = of(batch.old_logps),
          .ref_logps = of(batch.ref_logps),
          .entropies = of(batch.entropies)};
}

// The objective and the counts with which the losses of the pieces of a batch add up to its loss.
// A mean over the tokens of a row is one over all tokens with the count of that row.
class PieceLoss {
 public:
  PieceLoss(const PolicyArrays& batch, const PolicyObjective& objective,
            const Normalizer& normalizer)
      : batch_(batch),
        objective_(objective),
        by_row_(objective.aggregation.mode == Aggregation::Mode::sequence_mean_token_mean) {
    check_arrays("linear_policy_loss", batch, objective, {});
    const Normalizer local = local_counts(batch, objective, torch_executor());
    const StepCounts counts = step_counts("linear_policy_loss", normalizer,
                                          {local.policy.value_or(0), local.sequences.value_or(0)});
    normalizer_ = {.policy = counts.policy.tokens,
                   .kl = counts.kl.tokens,
                   .sequences = counts.policy.sequences,
                   .world_size = normalizer.world_size};
    if (by_row_) objective_.aggregation.mode = Aggregation::Mode::token_mean;
  }

  void add(const Piece& piece, const PolicyGradients& gradients) {
    Normalizer normalizer = normalizer_;
    if (by_row_) {
      const Piece whole{piece.row, 0, batch_.layout.length(piece.row) - 1};
      const double tokens = *local_counts(piece_of(batch_, whole), objective_).policy;
      normalizer.policy = normalizer.kl = tokens * *normalizer_.sequences;
    }
    const PolicyGradients out{piece_of(gradients.logps, batch_.layout, piece),
                              piece_of(gradients.entropies, batch_.layout, piece)};
    const PolicyTotals part = policy_loss(piece_of(batch_, piece), objective_, normalizer, out);
    totals_.loss += part.loss;
    totals_.metrics.merge(part.metrics);
  }

  const PolicyTotals& totals() const { return totals_; }

 private:
  const PolicyArrays& batch_;
  PolicyObjective objective_;
  bool by_row_;
  Normalizer normalizer_;
  PolicyTotals totals_;
};

// visit(piece) for the tokens at `places`, ascending in the order of memory.
template <class Visit>
void for_each_piece(const RowLayout& layout, const int64_t* places, int64_t count, Visit visit) {
  int64_t row = 0;
  const auto begin_of = [&](int64_t i) {
    return layout.packed() ? layout.offset(i) : i * layout.columns;
  };
  for (int64_t i = 0; i < count;) {
    while (begin_of(row) + layout.length(row) <= places[i]) ++row;
    const int64_t begin = begin_of(row), end = begin + layout.length(row);
    int64_t last = i;
    while (last + 1 < count && places[last + 1] < end) ++last;
    visit(Piece{row, places[i] - begin, places[last] - begin});
    i = last + 1;
  }
}

// ---- one sweep ----------------------------------------------------------------------------------

struct SweepResult {
  PolicyTotals totals;
  LinearGradient gradient;
  at::Tensor logps, entropies;
};

template <class T>
void scatter(const std::vector<double>& values, const int64_t* places, const at::Tensor& out) {
  T* data = out.data_ptr<T>();
  for (size_t i = 0; i < values.size(); ++i) data[places[i]] = static_cast<T>(values[i]);
}

template <class T>
void gather(const at::Tensor& in, const int64_t* places, std::vector<double>& values) {
  const T* data = in.const_data_ptr<T>();
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(data[places[i]]);
}

// batch.logps and batch.entropies: contiguous zeros, filled here.
template <class T>
SweepResult policy_sweep(const detail::LinearInputs& inputs, const RowOptions& row,
                         int64_t chunk_bytes, const PolicyBatch& batch,
                         const PolicyObjective& objective, const Normalizer& normalizer,
                         detail::WantedLinear wanted) {
  const detail::PolicyViews views(batch);
  const RowLayout& layout = views.arrays().layout;
  PieceLoss loss(views.arrays(), objective, normalizer);

  const bool entropic = batch.entropies.defined();
  const at::Tensor dlogps = at::zeros_like(batch.logps);
  const at::Tensor dentropies = entropic ? at::zeros_like(batch.logps) : at::Tensor();
  PolicyGradients gradients{.logps = detail::mutable_token_array(dlogps)};
  if (entropic) gradients.entropies = detail::mutable_token_array(dentropies);

  const at::Tensor rows = at::nonzero(batch.response_mask.reshape({-1})).view({-1});
  LinearSweep sweep(inputs, rows, chunk_bytes);
  detail::LinearGradientSum sum(inputs, wanted, sweep.chunks());
  std::vector<RowStatistics> statistics;
  std::vector<double> values, upstream, entropy_upstream;
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    const int64_t count = chunk.logits.size(0);
    const int64_t* places = rows.const_data_ptr<int64_t>() + chunk.begin;
    const int64_t* ids = chunk.targets.const_data_ptr<int64_t>();
    const ConstLogits logits = detail::rows_of(chunk.logits);
    const auto size = static_cast<size_t>(count);
    statistics.resize(size), values.resize(size), upstream.resize(size);
    entropy_upstream.assign(size, 0);

    row_statistics(logits, ids, row, statistics.data(), torch_executor());
    for (size_t k = 0; k < size; ++k) values[k] = logp(statistics[k], row);
    scatter<T>(values, places, batch.logps);
    if (entropic) {
      std::transform(statistics.begin(), statistics.end(), values.begin(), entropy);
      scatter<T>(values, places, batch.entropies);
    }
    for_each_piece(layout, places, count, [&](const Piece& piece) { loss.add(piece, gradients); });
    if (!wanted.any()) continue;
    gather<T>(dlogps, places, upstream);
    if (entropic) gather<T>(dentropies, places, entropy_upstream);
    row_gradients(logits, ids, row, statistics.data(), upstream.data(), entropy_upstream.data(),
                  detail::writable(chunk.logits), torch_executor());
    sum.add(chunk);
  }
  return {loss.totals(), sum.take(), batch.logps, batch.entropies};
}

class LinearPolicyLoss : public torch::autograd::Function<LinearPolicyLoss> {
 public:
  template <class Compute>
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const Compute* compute, SweepResult* result) {
    *result =
        (*compute)({hidden.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()});
    const LinearGradient& gradient = result->gradient;
    const at::Tensor dhidden =
        gradient.hidden.defined() ? gradient.hidden.view(hidden.sizes()) : gradient.hidden;
    context->save_for_backward(
        {dhidden, gradient.weight, gradient.bias, hidden, weight, bias.value_or(at::Tensor())});
    return at::scalar_tensor(result->totals.loss, at::dtype(detail::result_type(hidden)));
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    variable_list gradients(5);
    for (size_t i = 0; i < 3; ++i) {
      gradients[i] = detail::scaled("linear_policy_loss", upstream[0], saved[i], saved[i + 3]);
    }
    return gradients;
  }
};

// ---- doors --------------------------------------------------------------------------------------

void check_absent(const std::string& function, const char* name, const at::Tensor& tensor) {
  detail::check_value(!tensor.defined(),
                      function + ": " + name + " must be absent, got a tensor. It is made here");
}

// Masked positions are ignored ones.
at::Tensor active_targets(const at::Tensor& targets, const at::Tensor& mask,
                          const LinearOptions& options) {
  return mask.defined() && mask.sizes() == targets.sizes()
             ? targets.masked_fill(mask == 0, options.ignore_index)
             : targets;
}

}  // namespace

LinearPolicyOutput linear_policy_loss(const at::Tensor& hidden, const LinearHead& head,
                                      const at::Tensor& targets, const PolicyBatch& given,
                                      const PolicyObjective& objective,
                                      const Normalizer& normalizer, const LinearOptions& options) {
  const std::string name = "linear_policy_loss";
  check_absent(name, "logps", given.logps);
  check_absent(name, "entropies", given.entropies);
  LinearOptions asked = options;
  asked.statistics = false;
  asked.entropies = options.entropies || objective.entropy.coefficient != 0;
  const bool tokens = targets.defined() && given.response_mask.defined();
  const at::Tensor active =
      tokens ? active_targets(targets, given.response_mask, options) : targets;
  const detail::LinearInputs inputs = detail::checked_linear(name, hidden, head, active, asked);

  PolicyBatch batch = given;
  const auto type = at::dtype(detail::result_type(hidden)).device(hidden.device());
  batch.logps = at::zeros(targets.sizes(), type);
  if (asked.entropies) batch.entropies = at::zeros(targets.sizes(), type);
  batch = detail::checked(name, batch);
  detail::with_value_errors([&] { check_objective(name, objective); });

  if (objective.level != RatioLevel::token || !hidden.is_cpu()) {
    const TokenLogps made = linear_token_logps(hidden, head, active, asked);
    batch.logps = made.logps;
    batch.entropies = made.entropies;
    const LossOutput out = policy_loss(batch, objective, normalizer);
    return {out.loss, out.metrics, made.logps.detach(),
            asked.entropies ? made.entropies.detach() : at::Tensor()};
  }
  const RowOptions row = detail::row_options(asked);
  SweepResult result;
  const auto compute = [&](detail::WantedLinear wanted) {
    const auto sweep =
        hidden.scalar_type() == at::kDouble ? policy_sweep<double> : policy_sweep<float>;
    return sweep(inputs, row, asked.chunk_bytes, batch, objective, normalizer, wanted);
  };
  return detail::with_value_errors([&] {
    const at::Tensor loss = LinearPolicyLoss::apply(
        *detail::input_of_graph(hidden), *detail::input_of_graph(head.weight),
        detail::input_of_graph(head.bias), &compute, &result);
    return LinearPolicyOutput{loss, detail::metric_tensors(result.totals.metrics), result.logps,
                              result.entropies};
  });
}

PreferenceOutput linear_preference_loss(const at::Tensor& hidden, const LinearHead& head,
                                        const at::Tensor& targets, const PreferenceBatch& given,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer,
                                        const LinearOptions& options) {
  const std::string name = "linear_preference_loss";
  check_absent(name, "logps", given.logps);
  detail::check_value(given.response_mask.defined(),
                      name + ": response_mask must be given, got none");
  LinearOptions asked = options;
  asked.statistics = asked.entropies = false;
  const at::Tensor active =
      targets.defined() ? active_targets(targets, given.response_mask, options) : targets;
  detail::checked_linear(name, hidden, head, active, asked);
  PreferenceBatch batch = given;
  batch.logps = linear_token_logps(hidden, head, active, asked).logps;
  return preference_loss(batch, objective, normalizer);
}

}  // namespace tether
