#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

#include "libtorch/evaluators.h"
#include "libtorch/flat_batch.h"

namespace tether::detail {
namespace {

// The measures of the active tokens of each segment, at each of its tokens. The extremes have the
// sum's NaN and infinity.
at::Tensor reduced(Reduction reduction, const FlatBatch& batch, const FlatSegments& segments,
                   const at::Tensor& measure) {
  const at::Tensor wide = at::where(batch.active, measure, at::zeros_like(measure)).to(at::kDouble);
  at::Tensor sums = segments.sums(batch.weight.to(at::kDouble) * wide);
  const auto extreme = [&](const char* reduce, double none) {
    const at::Tensor seen = at::where(batch.active, wide, at::full({}, none, wide.options()));
    const at::Tensor start = at::full({segments.count}, none, wide.options());
    return start.scatter_reduce(0, segments.index, seen, reduce) + 0 * sums;
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  switch (reduction) {
    case Reduction::sum:
      break;
    case Reduction::mean:
      sums = sums / segments.sums(batch.weight.to(at::kDouble));
      break;
    case Reduction::min:
      sums = extreme("amin", kInfinity);
      break;
    case Reduction::max:
      sums = extreme("amax", -kInfinity);
      break;
  }
  return segments.spread(sums).to(measure.scalar_type());
}

}  // namespace

at::Tensor token_weights(const std::vector<TokenWeight>& weights, const FlatBatch& batch,
                         const at::Tensor& turn_ids) {
  at::Tensor out = at::ones_like(batch.logp);
  const TensorNumber unread{at::full_like(batch.logp, NAN)};
  for (const auto& [formula, level] : weights) {
    const Traits& traits = formula.traits();
    const TensorWeightToken token{
        traits.reads_policy ? TensorNumber{batch.logp} : unread,
        {batch.old_logp},
        traits.needs_ref_logps ? TensorNumber{batch.ref_logp} : unread,
        traits.needs_rollout_logps ? TensorNumber{batch.rollout_logp} : unread,
        {batch.advantage}};
    // What is not finite, the formula may hide.
    at::Tensor trace = 0 * (batch.old_logp + 0 * batch.advantage);
    if (traits.reads_policy) trace = trace + 0 * batch.logp;
    if (traits.needs_ref_logps) trace = trace + 0 * batch.ref_logp;
    if (traits.needs_rollout_logps) trace = trace + 0 * batch.rollout_logp;
    TensorNumber statistic{on_tensors(formula, {token, nullptr}) + trace};
    const WeightLevelRule& rule = rule_of(level);
    if (rule.segment != Segment::token) {
      const FlatSegments segments = segments_of(batch, rule.segment, turn_ids);
      statistic.value = reduced(rule.reduction, batch, segments, statistic.value);
    }
    const at::Tensor own = on_tensors(formula, {token, &statistic});
    out = out * (own + 0 * statistic.value);
  }
  return at::where(batch.active, out, at::ones_like(out));
}

}  // namespace tether::detail
