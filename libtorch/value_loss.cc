#include "libtorch/value_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <string>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/flat_batch.h"
#include "libtorch/fused_loss.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

struct Names {
  static constexpr const char* kFunction = "value_loss";
};
using ValueLoss = detail::FusedLoss<Names, ValueBatch, ValueObjective, Normalizer>;

detail::FusedResult compute_on_cpu(const ValueBatch& batch, const ValueObjective& objective,
                                   const Normalizer& normalizer, bool with_gradient) {
  return detail::fused_on_cpu(batch.values, with_gradient, [&](const MutableArray& gradient) {
    return value_loss(face::arrays_of(Names::kFunction, batch), objective, normalizer, gradient,
                      torch_executor());
  });
}

// The tokens of a batch side by side, [N]: 0 in masked slots, finite ones that their squares are.
struct FlatValues {
  at::Tensor weight, value, old_value, target;
};

FlatValues flattened(const ValueBatch& batch) {
  const auto dtype = detail::result_type(batch.values);
  const double largest = dtype == at::kDouble ? Largest<double>::kInput : Largest<float>::kInput;
  FlatValues out;
  out.weight = batch.response_mask.to(dtype).reshape({-1});
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor each = tensor.detach().to(dtype).reshape({-1});
    return detail::saturated(at::where(out.weight != 0, each, at::zeros_like(each)), largest);
  };
  out.value = selected(batch.values).requires_grad_(true);
  const bool clipped = batch.old_values.defined();
  out.old_value = clipped ? selected(batch.old_values) : out.value.detach();
  out.target = selected(batch.returns);
  return out;
}

// What the terms of each token are multiplied by beside its weight, [N] in double.
at::Tensor token_factors(const ValueBatch& batch, const at::Tensor& weight,
                         const Aggregation& aggregation, const Normalizer& normalizer) {
  const int64_t rows = face::count_rows(batch);
  const detail::FlatSegments of_rows{
      detail::row_of_tokens(batch.values, batch.offsets, rows), rows, {}};
  const at::Tensor n = of_rows.sums(weight.to(at::kDouble));
  const at::Tensor factors =
      detail::row_factors(aggregation, normalizer.policy, normalizer.sequences, n, n);
  return of_rows.spread(detail::bounded(detail::bounded(factors) * bounded(normalizer.factor())));
}

// The sums of ValueMetrics.
at::Tensor sums_of(const FlatValues& flat, const at::Tensor& loss, const at::Tensor& dloss) {
  using M = ValueMetrics;
  std::vector<at::Tensor> each(M::kSums);
  const auto number = [](const at::Tensor& x) { return x + 0 * x; };  // infinity is NaN
  const at::Tensor value = flat.value.detach(), target = number(flat.target);
  const at::Tensor error = number(flat.target - value);
  each[M::kTokens] = at::ones_like(value);
  each[M::kLoss] = loss;
  each[M::kClipped] = (dloss == 0).logical_and(loss > 0);
  each[M::kReturn] = target;
  each[M::kReturnSquared] = target.square();
  each[M::kError] = error;
  each[M::kErrorSquared] = error.square();
  const at::Tensor n = flat.weight.to(at::kDouble).sum();
  const auto deviation = [&](const at::Tensor& x) {
    const at::Tensor mean = (flat.weight * x).to(at::kDouble).sum() / n;
    return at::where(n > 0, x - mean, 0.0).square();
  };
  each[M::kReturnSpread] = deviation(target.to(at::kDouble));
  each[M::kErrorSpread] = deviation(error.to(at::kDouble));
  for (at::Tensor& sum : each) sum = (flat.weight * sum).to(at::kDouble).sum();
  return at::stack(each);
}

detail::FusedResult compute_on_tensors(const ValueBatch& batch, const ValueObjective& objective,
                                       const Normalizer& normalizer, bool with_gradient) {
  step_counts(Names::kFunction, normalizer, TermCounts{}, objective.aggregation);
  const c10::InferenceMode normal(false);
  at::AutoGradMode enabled(true);
  const FlatValues flat = flattened(batch);
  const TensorValueToken token{{flat.value}, {flat.old_value}, {flat.target}};
  const at::Tensor loss = detail::bounded(detail::on_tensors(objective.loss, token));
  const at::Tensor dloss = detail::derivative(loss.sum(), flat.value);
  const at::Tensor sound = at::isfinite(flat.value)
                               .logical_and(at::isfinite(flat.old_value))
                               .logical_and(at::isfinite(flat.target));
  const at::Tensor terms = loss + detail::spoiled(sound, flat.value);
  const at::Tensor factors = token_factors(batch, flat.weight, objective.aggregation, normalizer);
  detail::FusedResult out;
  if (with_gradient) {
    const at::Tensor slope = detail::bounded(detail::derivative(terms.sum(), flat.value));
    const at::Tensor factor = flat.weight * detail::bounded(factors.to(slope.scalar_type()));
    out.gradient = detail::bounded(factor * slope).view(batch.values.sizes());
  }
  at::AutoGradMode disabled(false);
  const at::Tensor each = detail::bounded((flat.weight * terms).to(at::kDouble) * factors);
  const at::Tensor active = flat.weight != 0;
  out.loss = detail::narrowed(at::where(active, each, at::zeros_like(each)).sum(), batch.values);
  out.sums = sums_of(flat, terms.detach(), dloss);
  return out;
}

// By the kernels for CUDA; what they have none for by torch's operations.
detail::FusedResult compute_on_cuda(const ValueBatch& batch, const ValueObjective& objective,
                                    const Normalizer& normalizer, bool with_gradient) {
  const detail::CudaKernels* kernels = detail::cuda_kernels(batch.values);
  if (auto found = kernels->value_loss(batch, objective, normalizer, with_gradient)) return *found;
  return compute_on_tensors(detail::looked_at(Names::kFunction, batch), objective, normalizer,
                            with_gradient);
}

ValueOutput run(const ValueBatch& given, const ValueObjective& objective,
                const Normalizer& normalizer, ValueLoss::Compute compute,
                detail::Offsets offsets = detail::Offsets::looked_at) {
  return detail::with_public_errors([&] {
    const ValueBatch batch = detail::checked(Names::kFunction, given, offsets);
    check_objective(Names::kFunction, objective);
    ValueOutput out;
    out.loss = ValueLoss::apply(*detail::input_of_graph(batch.values), compute, &batch, &objective,
                                &normalizer, &out.metrics.sums);
    return out;
  });
}

}  // namespace

ValueMetrics ValueMetricTensors::to_host() const {
  ValueMetrics out;
  detail::copy_block(Names::kFunction, sums, out.sums.data(), out.sums.size());
  return out;
}

std::map<std::string, double> ValueMetricTensors::to_map() const { return to_host().to_map(); }

ValueOutput value_loss(const ValueBatch& batch, const ValueObjective& objective,
                       const Normalizer& normalizer) {
  if (detail::cuda_kernels(batch.values)) {
    return run(batch, objective, normalizer, compute_on_cuda, detail::Offsets::as_they_are);
  }
  const bool on_cpu = !batch.values.defined() || batch.values.is_cpu();
  return run(batch, objective, normalizer, on_cpu ? compute_on_cpu : compute_on_tensors);
}

ValueOutput detail::value_loss_any_device(const ValueBatch& batch, const ValueObjective& objective,
                                          const Normalizer& normalizer) {
  return run(batch, objective, normalizer, compute_on_tensors);
}

at::Tensor whiten(const at::Tensor& values, const at::Tensor& response_mask,
                  const Whitening& options) {
  return detail::with_public_errors([&] {
    const auto batch = detail::checked(
        "whiten", WhiteningInputs<at::Tensor>{.values = values, .response_mask = response_mask});
    if (const auto* kernels = detail::cuda_kernels(values)) return kernels->whiten(batch, options);
    detail::check_value(values.is_cpu(),
                        "whiten: values must be on cpu, got " + values.device().str());
    const at::Tensor out = at::empty(values.sizes(), at::dtype(values.scalar_type()));
    const WhiteningArrays arrays = face::arrays_of("whiten", batch);
    whiten(arrays, moments(arrays), options, face::mutable_token_array(out));
    return out;
  });
}

}  // namespace tether
