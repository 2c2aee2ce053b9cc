#include "libtorch/flat_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "libtorch/arrays.h"
#include "libtorch/tensor_number.h"
#include "rl/kernels/token_block.h"

namespace tether::detail {

at::Tensor row_of_tokens(const at::Tensor& tokens, const at::Tensor& offsets, int64_t rows) {
  const at::Tensor index = at::arange(rows, at::dtype(at::kLong).device(tokens.device()));
  if (!offsets.defined()) return index.unsqueeze(1).expand(tokens.sizes()).reshape({-1});
  return at::repeat_interleave(index, offsets.diff().to(at::kLong).to(tokens.device()));
}

double largest_input(bool wide) {
  return wide ? Largest<double>::kInput : double(Largest<float>::kInput);
}

at::Tensor saturated(const at::Tensor& x, double largest) {
  return at::where(at::isfinite(x), x.clamp(-largest, largest), x);
}

at::Tensor beside_ratio(const at::Tensor& advantage, const at::Tensor& log_ratio) {
  const bool wide = advantage.scalar_type() == at::kDouble;
  const double of_ratio = wide ? Largest<double>::kOfRatio : double(Largest<float>::kOfRatio);
  const at::Tensor largest = of_ratio / exp(TensorNumber{log_ratio.detach()}).value;
  return at::where(at::isfinite(advantage), advantage.clamp(-largest, largest), advantage);
}

FlatBatch flattened(const PolicyBatch& batch, const std::vector<TokenWeight>& weights) {
  const auto dtype = result_type(batch.logps);
  const bool wide = dtype == at::kDouble;
  FlatBatch out;
  out.rows = face::count_rows(batch);
  out.row = row_of_tokens(batch.logps, batch.offsets, out.rows);
  out.weight = batch.response_mask.to(dtype, /*non_blocking=*/false, /*copy=*/true).reshape({-1});
  out.active = out.weight != 0;
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().to(dtype).reshape({-1});
    return saturated(at::where(out.active, values, at::zeros_like(values)), largest_input(wide));
  };
  const bool per_row = batch.advantages.sizes() != batch.logps.sizes();
  out.logp = selected(batch.logps);
  out.old_logp = batch.old_logps.defined() ? selected(batch.old_logps) : out.logp;
  out.ref_logp = batch.ref_logps.defined() ? selected(batch.ref_logps) : at::zeros_like(out.logp);
  out.rollout_logp =
      batch.rollout_logps.defined() ? selected(batch.rollout_logps) : at::zeros_like(out.logp);
  out.entropy = at::zeros_like(out.logp);
  if (batch.entropies.defined()) {
    const at::Tensor entropies = batch.entropies.detach().to(dtype).reshape({-1});
    out.entropy = batch.entropy_weights.defined() ? selected(batch.entropies)
                                                  : at::where(out.active, entropies, out.entropy);
  }
  out.advantage =
      selected(per_row ? batch.advantages.select(1, 0).index_select(0, out.row) : batch.advantages);
  out.row_tokens = row_sums(out, out.weight);
  const auto given = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return at::ones_like(out.logp);
    const at::Tensor values = tensor.detach().to(dtype).reshape({-1});
    const double largest = wide ? Largest<double>::kWeight : double(Largest<float>::kWeight);
    return saturated(at::where(out.active, values, at::ones_like(values)), largest);
  };
  const at::Tensor turn_ids = any_of_turns(weights) ? turn_ids_of(batch) : at::Tensor{};
  out.token_weight = given(batch.token_weights) * token_weights(weights, out, turn_ids);
  out.kl_weight = given(batch.kl_weights);
  out.entropy_weight = given(batch.entropy_weights);
  return out;
}

const at::Tensor& FlatBatch::logp_of(KlReference policy) const {
  switch (policy) {
    case KlReference::reference:
      return ref_logp;
    case KlReference::old:
      return old_logp;
    case KlReference::rollout:
      return rollout_logp;
  }
  return ref_logp;
}

PolicyBatch gated(const PolicyBatch& batch, const PolicyObjective& objective) {
  const std::vector<TokenWeight> gates = weights_that(true, objective.weights);
  if (gates.empty()) return batch;
  PolicyBatch without = batch;
  without.token_weights.reset();
  const FlatBatch flat = flattened(without, gates);
  const at::Tensor kept = flat.weight + 0 * flat.token_weight;
  PolicyBatch out = batch;
  out.turn_ids = turn_ids_of(batch).view(batch.logps.sizes());
  out.response_mask =
      at::where(flat.token_weight == 0, at::zeros_like(kept), kept).view(batch.logps.sizes());
  return out;
}

at::Tensor row_sums(const FlatBatch& batch, const at::Tensor& tokens) {
  return at::zeros({batch.rows}, tokens.options()).index_add(0, batch.row, tokens);
}

at::Tensor FlatSegments::sums(const at::Tensor& tokens) const {
  return at::zeros({count}, tokens.options()).index_add(0, index, tokens);
}
at::Tensor FlatSegments::spread(const at::Tensor& values) const {
  return values.index_select(0, index);
}

FlatSegments segments_of(const FlatBatch& batch, Segment segment, const at::Tensor& turn_ids) {
  if (segment != Segment::turn) return {batch.row, batch.rows, batch.row_tokens};
  const int64_t size = batch.weight.size(0);
  FlatSegments out{batch.row, size, batch.weight};
  if (size == 0) return out;
  // Each active token beside the active one before it.
  const at::Tensor place = at::arange(size, batch.row.options());
  const at::Tensor last = std::get<0>(at::where(batch.active, place, -1).cummax(0));
  const at::Tensor none = at::full({1}, -1, last.options());
  const at::Tensor before = at::cat({none, last.slice(0, 0, size - 1)});
  const at::Tensor other = before.clamp_min(0);
  const auto differs = [&](const at::Tensor& of) { return of != of.index_select(0, other); };
  const at::Tensor first =
      (before < 0).logical_or(differs(batch.row)).logical_or(differs(turn_ids));
  out.index = (batch.active.logical_and(first).cumsum(0) - 1).clamp_min(0);
  out.n = out.sums(batch.weight);
  return out;
}

// A run of the mask has the number of slots before it that are none of a turn.
at::Tensor turn_ids_of(const PolicyBatch& batch) {
  if (batch.turn_ids.defined()) return batch.turn_ids.reshape({-1});
  const at::Tensor weight = batch.response_mask.to(result_type(batch.logps));
  return (weight.reshape({-1}) == 0).cumsum(0);
}

// 1 / denominator of each row's terms, as row_factor (rl/aggregation.h), without a look at the
// values.
at::Tensor row_factors(const Aggregation& aggregation, const std::optional<double>& tokens,
                       const std::optional<double>& sequences, const at::Tensor& row_tokens,
                       const at::Tensor& lengths) {
  const auto given = [&](const std::optional<double>& count, const at::Tensor& local) {
    return count ? at::scalar_tensor(*count, local.options()) : local;
  };
  const at::Tensor n = given(tokens, row_tokens.sum());
  const at::Tensor s = given(sequences, (row_tokens > 0).sum().to(row_tokens.scalar_type()));
  at::Tensor denominator;
  switch (aggregation.mode) {
    case Aggregation::Mode::token_mean:
      denominator = n.expand_as(row_tokens);
      break;
    case Aggregation::Mode::sequence_mean_token_mean:
      denominator = s * lengths;
      break;
    case Aggregation::Mode::sequence_mean_token_sum:
      denominator = s.expand_as(row_tokens);
      break;
    case Aggregation::Mode::sequence_sum_over_constant:
      denominator = (s * aggregation.constant).expand_as(row_tokens);
      break;
    case Aggregation::Mode::token_sum:
      denominator = at::ones_like(row_tokens);
      break;
  }
  // A row with tokens whose stated denominator is no positive number spoils the loss.
  const at::Tensor otherwise =
      at::where(row_tokens > 0, at::full_like(denominator, NAN), at::zeros_like(denominator));
  return at::where(denominator > 0, 1 / denominator, otherwise);
}

// What overflowed as the largest number, with the gradient as it is (rl/kernels/token_block.h).
at::Tensor bounded(const at::Tensor& x) {
  const bool wide = x.scalar_type() == at::kDouble;
  const double largest = wide ? Largest<double>::kResult : double(Largest<float>::kResult);
  return with_gradient_of({x.detach().clamp(-largest, largest)}, TensorNumber{x}).value;
}

at::Tensor narrowed(const at::Tensor& sum, const at::Tensor& input) {
  const at::ScalarType type = result_type(input);
  const double largest = type == at::kDouble ? std::numeric_limits<double>::max()
                                             : double(std::numeric_limits<float>::max());
  return sum.detach().clamp(-largest, largest).to(type);
}

// d value / d x; 0 where value does not depend on x, which torch takes for a mistake.
at::Tensor derivative(const at::Tensor& value, const at::Tensor& x) {
  if (!value.requires_grad()) return at::zeros_like(x);
  const at::Tensor slope = torch::autograd::grad({value}, {x}, {}, /*retain_graph=*/true,
                                                 /*create_graph=*/false, /*allow_unused=*/true)[0];
  return slope.defined() ? slope : at::zeros_like(x);
}

// 0, or NaN with a gradient of NaN: saturation and clips hide what is not sound.
at::Tensor spoiled(const at::Tensor& sound, const at::Tensor& logp) {
  return at::where(sound, at::zeros_like(logp), NAN).detach() * logp;
}

}  // namespace tether::detail
