#include "libtorch/linear_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/linear_checks.h"
#include "libtorch/logits_rows.h"
#include "libtorch/policy_inputs.h"
#include "libtorch/stored_gradient.h"
#include "rl/kernels/chunked_policy_loss.h"

namespace tether {
namespace {

using detail::LinearGradient;
using detail::LinearSweep;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SweepResult {
  PolicyTotals totals;
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

SweepResult policy_sweep(const detail::LinearInputs& inputs, const LinearOptions& options,
                         const PolicyBatch& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, detail::WantedLinear wanted) {
  PolicyArrays arrays = face::arrays_of("linear_policy_loss", batch);
  arrays.logps = arrays.entropies = {};
  const auto type = detail::result_type(inputs.hidden);
  ChunkedPolicyLoss loss("linear_policy_loss", arrays,
                         type == at::kDouble ? DType::float64 : DType::float32, objective,
                         normalizer, torch_executor());

  const at::Tensor places = at::nonzero(batch.response_mask.reshape({-1})).view({-1});
  const at::Tensor logps = at::empty({places.numel()}, at::dtype(at::kDouble));
  const at::Tensor entropies =
      options.entropies ? at::empty({places.numel()}, at::dtype(at::kDouble)) : at::Tensor();
  LinearSweep sweep(inputs, places, detail::chunk_size(options));
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
  return {loss.totals(), sum.take(), scattered(logps, places, sizes, type),
          options.entropies ? scattered(entropies, places, sizes, type) : at::Tensor()};
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

LinearPolicyOutput linear_policy_loss(const at::Tensor& given_hidden, const LinearHead& given_head,
                                      const at::Tensor& targets, const PolicyBatch& given,
                                      const PolicyObjective& objective,
                                      const Normalizer& normalizer, const LinearOptions& options) {
  const std::string name = "linear_policy_loss";
  check_absent(name, "logps", given.logps);
  check_absent(name, "entropies", given.entropies);
  LinearOptions asked = options;
  asked.statistics = false;
  asked.entropies = options.entropies || objective.entropy.coefficient != 0;
  const auto [hidden, head] = detail::in_one_type(given_hidden, given_head);
  const bool tokens = targets.defined() && given.response_mask.defined();
  const at::Tensor active =
      tokens ? active_targets(targets, given.response_mask, options) : targets;
  const detail::LinearInputs inputs = detail::checked_linear(name, hidden, head, active, asked);

  PolicyBatch batch = given;
  const auto type = at::dtype(detail::result_type(hidden)).device(hidden.device());
  batch.logps = at::zeros(targets.sizes(), type);
  if (asked.entropies) batch.entropies = at::zeros(targets.sizes(), type);
  detail::with_public_errors([&] {
    batch = detail::checked(name, batch);
    check_objective(name, objective);
  });

  if (objective.level != RatioLevel::token || !hidden.is_cpu()) {
    const TokenLogps made = linear_token_logps(hidden, head, active, asked);
    batch.logps = made.logps;
    batch.entropies = made.entropies;
    const LossOutput out = policy_loss(batch, objective, normalizer);
    return {out.loss, out.metrics, made.logps.detach(),
            asked.entropies ? made.entropies.detach() : at::Tensor()};
  }
  SweepResult result;
  const auto compute = [&](detail::WantedLinear wanted) {
    return policy_sweep(inputs, asked, batch, objective, normalizer, wanted);
  };
  return detail::with_public_errors([&] {
    const at::Tensor loss = LinearPolicyLoss::apply(
        *detail::input_of_graph(hidden), *detail::input_of_graph(head.weight),
        detail::input_of_graph(head.bias), &compute, &result);
    return LinearPolicyOutput{loss, detail::metric_tensors(result.totals.metrics), result.logps,
                              result.entropies};
  });
}

PreferenceOutput linear_preference_loss(const at::Tensor& given_hidden,
                                        const LinearHead& given_head, const at::Tensor& targets,
                                        const PreferenceBatch& given,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer,
                                        const LinearOptions& options) {
  const std::string name = "linear_preference_loss";
  check_absent(name, "logps", given.logps);
  detail::check_value(given.response_mask.defined(),
                      name + ": response_mask must be given, got none");
  LinearOptions asked = options;
  asked.statistics = asked.entropies = false;
  const auto [hidden, head] = detail::in_one_type(given_hidden, given_head);
  const at::Tensor active =
      targets.defined() ? active_targets(targets, given.response_mask, options) : targets;
  detail::checked_linear(name, hidden, head, active, asked);
  PreferenceBatch batch = given;
  batch.logps = linear_token_logps(hidden, head, active, asked).logps;
  return preference_loss(batch, objective, normalizer);
}

}  // namespace tether
