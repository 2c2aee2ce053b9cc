#include "libtorch/flat_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "libtorch/arrays.h"
#include "rl/kernels/token_block.h"

namespace tether::detail {
namespace {

at::Tensor row_of_tokens(const PolicyBatch& batch, int64_t rows) {
  const auto options = at::dtype(at::kLong).device(batch.logps.device());
  const at::Tensor rows_index = at::arange(rows, options);
  if (!batch.offsets.defined()) {
    return rows_index.unsqueeze(1).expand(batch.logps.sizes()).reshape({-1});
  }
  const at::Tensor lengths = batch.offsets.diff().to(at::kLong);
  return at::repeat_interleave(rows_index, lengths.to(batch.logps.device()));
}

}  // namespace

double largest_logp(bool wide) { return wide ? 1e130 : 1e14; }

at::Tensor saturated(const at::Tensor& x, double largest) {
  return at::where(at::isfinite(x), x.clamp(-largest, largest), x);
}

FlatBatch flattened(const PolicyBatch& batch, const std::vector<TokenWeight>& weights) {
  const auto dtype = result_type(batch.logps);
  const bool wide = dtype == at::kDouble;
  FlatBatch out;
  out.rows = face::count_rows(batch);
  out.row = row_of_tokens(batch, out.rows);
  out.weight = batch.response_mask.to(dtype, /*non_blocking=*/false, /*copy=*/true).reshape({-1});
  out.active = out.weight != 0;
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().to(dtype).reshape({-1});
    return saturated(at::where(out.active, values, at::zeros_like(values)), largest_logp(wide));
  };
  const bool per_row = batch.advantages.sizes() != batch.logps.sizes();
  out.logp = selected(batch.logps);
  out.old_logp = batch.old_logps.defined() ? selected(batch.old_logps) : out.logp;
  out.ref_logp = batch.ref_logps.defined() ? selected(batch.ref_logps) : at::zeros_like(out.logp);
  out.rollout_logp =
      batch.rollout_logps.defined() ? selected(batch.rollout_logps) : at::zeros_like(out.logp);
  out.entropy = batch.entropies.defined() ? selected(batch.entropies) : at::zeros_like(out.logp);
  out.advantage =
      selected(per_row ? batch.advantages.select(1, 0).index_select(0, out.row) : batch.advantages);
  out.advantage = saturated(
      out.advantage, wide ? Largest<double>::kAdvantage : double(Largest<float>::kAdvantage));
  out.row_tokens = row_sums(out, out.weight);
  out.token_weight = token_weights(weights, out);
  return out;
}

PolicyBatch gated(const PolicyBatch& batch, const PolicyObjective& objective) {
  const std::vector<TokenWeight> gates = weights_that(true, objective.weights);
  if (gates.empty()) return batch;
  const FlatBatch flat = flattened(batch, gates);
  const at::Tensor kept = flat.weight + 0 * flat.token_weight;
  PolicyBatch out = batch;
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

}  // namespace tether::detail
