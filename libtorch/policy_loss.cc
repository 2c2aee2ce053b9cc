#include "libtorch/policy_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstring>
#include <optional>

#include "core/batch.h"
#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/policy_inputs.h"
#include "libtorch/stored_gradient.h"
#include "rl/kernels/gated_mask.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/policy_loss.h"
#include "rl/kernels/turns.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using detail::ComputedLoss;
using detail::WantedGradients;

using Compute = ComputedLoss (*)(const PolicyBatch&, const PolicyObjective&, const Normalizer&,
                                 WantedGradients);

class PolicyLoss : public torch::autograd::Function<PolicyLoss> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logps,
                            const std::optional<at::Tensor>& entropies, Compute compute,
                            const PolicyBatch* batch, const PolicyObjective* objective,
                            const Normalizer* normalizer, PolicyMetricTensors* metrics) {
    const WantedGradients wanted{logps.requires_grad(), entropies && entropies->requires_grad()};
    ComputedLoss computed = compute(*batch, *objective, *normalizer, wanted);
    *metrics = std::move(computed.metrics);
    // Of inputs only those with a gradient: the others may be of inference mode.
    context->save_for_backward({computed.dlogps, computed.dentropies,
                                wanted.logps ? logps : at::Tensor(),
                                wanted.entropies ? *entropies : at::Tensor()});
    return computed.loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return {detail::scaled("policy_loss", gradients[0], saved[0], saved[2]),
            detail::scaled("policy_loss", gradients[0], saved[1], saved[3]),
            {},
            {},
            {},
            {},
            {}};
  }
};

ComputedLoss compute_on_cpu(const PolicyBatch& batch, const PolicyObjective& objective,
                            const Normalizer& normalizer, WantedGradients wanted) {
  ComputedLoss out;
  PolicyGradients gradients;
  out.dlogps = detail::gradient_memory(wanted.logps, batch.logps, gradients.logps);
  out.dentropies = detail::gradient_memory(wanted.entropies, batch.entropies, gradients.entropies);
  const PolicyTotals totals = policy_loss(face::arrays_of("policy_loss", batch), objective,
                                          normalizer, gradients, torch_executor());
  out.loss = detail::result_scalar(totals.loss, batch.logps);
  out.metrics = detail::metric_tensors(totals.metrics);
  return out;
}

// By the kernels for CUDA; what they have none for by torch's operations.
ComputedLoss compute_on_cuda(const PolicyBatch& batch, const PolicyObjective& objective,
                             const Normalizer& normalizer, WantedGradients wanted) {
  const detail::CudaKernels* kernels = detail::cuda_kernels(batch.logps);
  if (auto found = kernels->policy_loss(batch, objective, normalizer, wanted)) return *found;
  return detail::tensor_policy_loss(detail::looked_at("policy_loss", batch), objective, normalizer,
                                    wanted);
}

LossOutput run(const PolicyBatch& unchecked, const PolicyObjective& objective,
               const Normalizer& normalizer, Compute compute,
               detail::Offsets offsets = detail::Offsets::looked_at) {
  return detail::with_public_errors([&] {
    const PolicyBatch batch = detail::checked("policy_loss", unchecked, offsets);
    check_objective("policy_loss", objective);
    check_needs("policy_loss", presence_of(batch), objective);
    LossOutput out;
    out.loss = PolicyLoss::apply(*detail::input_of_graph(batch.logps),
                                 detail::input_of_graph(batch.entropies), compute, &batch,
                                 &objective, &normalizer, &out.metrics);
    return out;
  });
}

}  // namespace

PolicyMetricTensors detail::metric_tensors(const PolicyMetrics& metrics) {
  const auto type = at::dtype(at::kDouble);
  PolicyMetricTensors out{at::empty({PolicyMetrics::kSums, 2}, type),
                          at::empty({PolicyMetrics::kMaxima}, type)};
  std::memcpy(out.sums.data_ptr(), metrics.sums.data(), sizeof(metrics.sums));
  std::memcpy(out.maxima.data_ptr(), metrics.maxima.data(), sizeof(metrics.maxima));
  return out;
}

PolicyMetrics PolicyMetricTensors::to_host() const {
  PolicyMetrics out;
  detail::check_value(sums.defined() && sums.numel() == PolicyMetrics::kSums * 2 &&
                          maxima.defined() && maxima.numel() == PolicyMetrics::kMaxima,
                      "policy_metrics: sums and maxima must be the blocks of a loss");
  const auto on_host = [](const at::Tensor& block) {
    return block.detach().to(at::kCPU, at::kDouble).contiguous();
  };
  const at::Tensor host_sums = on_host(sums), host_maxima = on_host(maxima);
  std::memcpy(out.sums.data(), host_sums.const_data_ptr(), sizeof(out.sums));
  std::memcpy(out.maxima.data(), host_maxima.const_data_ptr(), sizeof(out.maxima));
  return out;
}

std::map<std::string, double> PolicyMetricTensors::to_map() const { return to_host().to_map(); }

LossOutput policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                       const Normalizer& normalizer) {
  if (detail::cuda_kernels(batch.logps)) {
    return run(batch, objective, normalizer, compute_on_cuda, detail::Offsets::as_they_are);
  }
  if (batch.logps.defined() && !batch.logps.is_cpu()) {
    return detail::policy_loss_any_device(batch, objective, normalizer);
  }
  return run(batch, objective, normalizer, compute_on_cpu);
}

at::Tensor policy_token_losses(const PolicyBatch& unchecked, const PolicyObjective& objective) {
  const auto function = "policy_token_losses";
  return detail::with_public_errors([&] {
    PolicyBatch batch = detail::checked(function, unchecked);
    check_objective(function, objective);
    check_needs(function, presence_of(batch), objective);
    if (batch.logps.is_cpu()) {
      const PolicyArrays arrays = face::arrays_of(function, batch);
      check_weights(function, arrays.layout, arrays.response_mask);
      const bool by_turn =
          rule_of(objective.level).segment == Segment::turn || any_of_turns(objective.weights);
      if (by_turn) turn_marks<double>(function, arrays, torch_executor());
      GatedMask(function, arrays, objective, torch_executor());
    }
    batch.logps = detail::once_differentiable(function, batch.logps);
    batch.entropies = detail::once_differentiable(function, batch.entropies);
    return detail::tensor_token_losses(batch, objective);
  });
}

LossOutput detail::policy_loss_any_device(const PolicyBatch& batch,
                                          const PolicyObjective& objective,
                                          const Normalizer& normalizer) {
  return run(batch, objective, normalizer, detail::tensor_policy_loss);
}

}  // namespace tether
