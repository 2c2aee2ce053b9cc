#include "libtorch/linear_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string_view>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/linear_checks.h"
#include "libtorch/logits_rows.h"
#include "libtorch/policy_inputs.h"
#include "libtorch/stored_gradient.h"
#include "rl/kernels/chunked_policy_loss.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/preference_loss.h"

namespace tether {
namespace {

using detail::LinearGradient;
using detail::LinearInputs;
using detail::LinearSweep;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kPolicy = "linear_policy_loss";
constexpr const char* kPreference = "linear_preference_loss";

struct SweepResult {
  at::Tensor loss;
  PolicyMetricTensors metrics;
  LinearGradient gradient;
  at::Tensor logps, entropies;
};

// One value per token, at its place in a tensor of zeros.
at::Tensor scattered(const at::Tensor& values, const at::Tensor& places, at::IntArrayRef sizes,
                     at::ScalarType type) {
  at::Tensor out = at::zeros(sizes, at::dtype(type));
  out.view({-1}).index_copy_(0, places, values.to(type));
  return out;
}

SweepResult policy_sweep(const LinearInputs& inputs, const LinearOptions& options,
                         const PolicyBatch& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, detail::WantedLinear wanted) {
  PolicyArrays arrays = face::arrays_of(kPolicy, batch);
  arrays.logps = arrays.entropies = {};
  const auto type = detail::result_type(inputs.hidden);
  ChunkedPolicyLoss loss(kPolicy, arrays, type == at::kDouble ? DType::float64 : DType::float32,
                         objective, normalizer, torch_executor());

  const auto rows = detail::VisitedRows::where(batch.response_mask.reshape({-1}) != 0, inputs);
  const at::Tensor& places = rows.places;
  const at::Tensor logps = at::empty({places.numel()}, at::dtype(at::kDouble));
  const at::Tensor entropies =
      options.entropies ? at::empty({places.numel()}, at::dtype(at::kDouble)) : at::Tensor();
  LinearSweep sweep(inputs, rows, options);
  detail::LinearGradientSum sum(inputs, wanted, sweep.chunks());
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    loss.add(detail::writable(chunk.logits), chunk.targets.const_data_ptr<int64_t>(),
             places.const_data_ptr<int64_t>() + chunk.begin, detail::row_options(options),
             wanted.any(), logps.data_ptr<double>() + chunk.begin,
             options.entropies ? entropies.data_ptr<double>() + chunk.begin : nullptr);
    if (wanted.any()) sum.add(chunk);
  }
  const at::IntArrayRef sizes = batch.response_mask.sizes();
  const PolicyTotals totals = loss.totals();
  return {detail::result_scalar(totals.loss, inputs.hidden), detail::metric_tensors(totals.metrics),
          sum.take(), scattered(logps, places, sizes, type),
          options.entropies ? scattered(entropies, places, sizes, type) : at::Tensor()};
}

// The same by kernels for CUDA: the gradient of a chunk where its logits are read, and the loss of
// all log-probabilities.
SweepResult sweep_on_device(const LinearInputs& inputs, const LinearOptions& options,
                            const PolicyBatch& batch, const PolicyObjective& objective,
                            const Normalizer& normalizer, detail::WantedLinear wanted) {
  step_counts(kPolicy, normalizer, {}, objective.aggregation);  // in its own name
  const detail::CudaKernels* kernels = detail::row_kernels(inputs.hidden);
  PolicyBatch found = batch;
  found.logps = at::zeros_like(batch.logps);
  if (options.entropies) found.entropies = at::zeros_like(batch.logps);
  const at::Tensor active = batch.response_mask.reshape({-1}) != 0;
  LinearSweep sweep(inputs, detail::VisitedRows::where(active, inputs), options);
  detail::LinearGradientSum sum(inputs, wanted, sweep.chunks());
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    kernels->policy_gradient_of_logits(batch, objective, normalizer,
                                       {chunk.logits, inputs.targets, found.logps, found.entropies,
                                        chunk.begin, detail::row_options(options)});
    if (wanted.any()) sum.add(chunk);
  }
  const auto computed = kernels->policy_loss(found, objective, normalizer, {false, false});
  return {computed->loss, computed->metrics, sum.take(), found.logps, found.entropies};
}

// Whether the slope of a token is known where its logits are read: there kernels take no weight
// that looks at the policy, whose log-probability is still to be made, and none that takes tokens
// out, whose rows would not be read.
bool is_of_own_logits(const PolicyBatch& batch, const PolicyObjective& objective) {
  bool out = objective.weights.empty() || batch.old_logps.defined();
  for (const TokenWeight& weight : objective.weights) {
    const auto& traits = weight.formula.traits();
    out &= !traits.reads_policy && !traits.leaves;
  }
  return out && is_per_token(objective);
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
    // Of inputs only those with a gradient: the others may be of inference mode.
    const auto input = [](const at::Tensor& tensor) {
      return tensor.requires_grad() ? tensor : at::Tensor();
    };
    context->save_for_backward({dhidden, gradient.weight, gradient.bias, input(hidden),
                                input(weight), bias ? input(*bias) : at::Tensor()});
    return result->loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    variable_list gradients(5);
    for (size_t i = 0; i < 3; ++i) {
      gradients[i] = detail::scaled(kPolicy, upstream[0], saved[i], saved[i + 3]);
    }
    return gradients;
  }
};

LinearPolicyOutput loss_by_sweep(const LinearInputs& inputs, const PolicyBatch& batch,
                                 const PolicyObjective& objective, const Normalizer& normalizer,
                                 const LinearOptions& options) {
  const LinearInputs rows = detail::as_rows(inputs);
  SweepResult result;
  const auto sweep = detail::row_kernels(inputs.hidden) ? sweep_on_device : policy_sweep;
  const auto compute = [&](detail::WantedLinear wanted) {
    return sweep(rows, options, batch, objective, normalizer, wanted);
  };
  const at::Tensor loss = LinearPolicyLoss::apply(
      *detail::input_of_graph(inputs.hidden), *detail::input_of_graph(inputs.weight),
      detail::input_of_graph(inputs.bias), &compute, &result);
  return {loss, result.metrics, result.logps, result.entropies};
}

// Its offsets, which were looked at on the host, are where its rows are again.
template <class Batch>
void offsets_beside_rows(Batch& batch) {
  if (batch.offsets.defined()) batch.offsets = batch.offsets.to(batch.logps.device());
}

LinearPolicyOutput loss_of_logps(const LinearInputs& inputs, const PolicyBatch& given,
                                 const PolicyObjective& objective, const Normalizer& normalizer,
                                 const LinearOptions& options) {
  // What policy_loss would refuse in its own name.
  TermCounts counts;
  if (inputs.hidden.is_cpu() && !detail::row_kernels(inputs.hidden)) {
    counts = checked_counts(kPolicy, face::arrays_of(kPolicy, given), torch_executor());
  }
  step_counts(kPolicy, normalizer, counts, objective.aggregation);
  const TokenLogps made = detail::linear_token_logps(inputs, options);
  PolicyBatch batch = given;
  batch.logps = made.logps;
  batch.entropies = made.entropies;
  offsets_beside_rows(batch);
  const LossOutput out = policy_loss(batch, objective, normalizer);
  return {out.loss, out.metrics, made.logps.detach(),
          options.entropies ? made.entropies.detach() : at::Tensor()};
}

// ---- doors --------------------------------------------------------------------------------------

void check_absent(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  require(!tensor.defined(),
          [&] { return named(function, name) + " must be absent, got a tensor. It is made here"; });
}

// What the log-probabilities of the targets will be like.
at::Tensor like_logps(const LinearInputs& inputs) {
  const at::Tensor& hidden = inputs.hidden;
  return at::zeros(inputs.targets.sizes(),
                   at::dtype(detail::result_type(hidden)).device(hidden.device()));
}

// Masked positions become ignored ones, whatever their ids are; the others are checked.
void ignore_masked(std::string_view function, const at::Tensor& mask, const LinearOptions& options,
                   LinearInputs& inputs) {
  at::Tensor& targets = inputs.targets;
  const at::Tensor masked = mask.reshape(targets.sizes()) == 0;
  targets = targets.masked_fill(masked, options.row.ignore_index);
  detail::check_targets(function, inputs, options);
}

}  // namespace

LinearPolicyOutput linear_policy_loss(const at::Tensor& hidden, const LinearHead& head,
                                      const at::Tensor& targets, const PolicyBatch& given,
                                      const PolicyObjective& objective,
                                      const Normalizer& normalizer, const LinearOptions& options) {
  return detail::with_public_errors([&] {
    check_absent(kPolicy, "logps", given.logps);
    check_absent(kPolicy, "entropies", given.entropies);
    LinearOptions asked = options;
    asked.statistics = false;
    asked.entropies = options.entropies || objective.entropy.coefficient != 0;
    LinearInputs inputs = detail::checked_linear(kPolicy, hidden, head, targets, asked);
    const detail::CudaKernels* kernels = detail::row_kernels(inputs.hidden);
    PolicyBatch batch = given;
    batch.logps = like_logps(inputs);
    if (asked.entropies) batch.entropies = batch.logps;
    batch = detail::checked(kPolicy, batch, detail::Offsets::as_they_are);
    check_objective(kPolicy, objective);
    check_needs(kPolicy, presence_of(batch), objective);
    const bool has_loss = kernels && kernels->has_policy_loss(batch, objective, normalizer);
    if (!has_loss) batch = detail::looked_at(kPolicy, batch);
    ignore_masked(kPolicy, batch.response_mask, asked, inputs);
    const bool in_one_walk = kernels ? has_loss && is_of_own_logits(batch, objective)
                                     : is_per_token(objective) && inputs.hidden.is_cpu();
    return (in_one_walk ? loss_by_sweep : loss_of_logps)(inputs, batch, objective, normalizer,
                                                         asked);
  });
}

PreferenceOutput linear_preference_loss(const at::Tensor& hidden, const LinearHead& head,
                                        const at::Tensor& targets, const PreferenceBatch& given,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer,
                                        const LinearOptions& options) {
  return detail::with_public_errors([&] {
    check_absent(kPreference, "logps", given.logps);
    LinearOptions asked = options;
    asked.statistics = asked.entropies = false;
    LinearInputs inputs = detail::checked_linear(kPreference, hidden, head, targets, asked);
    PreferenceBatch batch = given;
    batch.logps = like_logps(inputs);
    batch =
        detail::checked(kPreference, detail::answers_as_rows(batch), detail::Offsets::as_they_are);
    check_objective(kPreference, objective);
    check_needs(kPreference, presence_of(batch), face::count_rows(batch), objective);
    check_denominators(kPreference, normalizer, objective);
    const detail::CudaKernels* kernels = detail::row_kernels(inputs.hidden);
    const bool has_loss = kernels && kernels->has_preference_loss(batch, objective, normalizer);
    if (!has_loss) batch = detail::looked_at(kPreference, batch);
    at::Tensor read = batch.response_mask != 0;
    if (batch.nll_mask.defined()) read = read | (batch.nll_mask != 0);
    ignore_masked(kPreference, read, asked, inputs);
    batch.logps = detail::linear_token_logps(inputs, asked).logps.view(batch.logps.sizes());
    offsets_beside_rows(batch);
    return preference_loss(batch, objective, normalizer);
  });
}

}  // namespace tether
