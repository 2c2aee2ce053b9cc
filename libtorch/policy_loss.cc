#include "libtorch/policy_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstring>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/policy_batch.h"
#include "rl/kernels/policy_loss.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The gradient as a function of the upstream gradient. It has no derivative of its own: without
// this node torch would take the stored gradient for a constant and return zero.
class PolicyGradient : public torch::autograd::Function<PolicyGradient> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& upstream, const at::Tensor& dlogps,
                            const at::Tensor& logps) {
    return (dlogps * upstream).to(logps.scalar_type());
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "policy_loss: backward must run once, got a second derivative. The loss has none");
  }
};

// What the gradient waits in: a loss scale comes too late for what float16 has already flushed to
// 0.
at::ScalarType stored_type(const at::Tensor& logps) {
  return logps.scalar_type() == at::kHalf ? at::kFloat : logps.scalar_type();
}

struct Computed {
  at::Tensor loss;
  at::Tensor dlogps;
  PolicyMetricTensors metrics;
};

using Compute = Computed (*)(const PolicyBatch&, const PolicyObjective&, const Normalizer&,
                             bool with_gradient);

class PolicyLoss : public torch::autograd::Function<PolicyLoss> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logps, Compute compute,
                            const PolicyBatch* batch, const PolicyObjective* objective,
                            const Normalizer* normalizer, PolicyMetricTensors* metrics) {
    Computed computed = compute(*batch, *objective, *normalizer, logps.requires_grad());
    *metrics = std::move(computed.metrics);
    context->save_for_backward({computed.dlogps, logps});
    return computed.loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& dlogps = saved[0];
    const at::Tensor& upstream = gradients[0];
    at::Tensor scaled;
    if (at::GradMode::is_enabled()) {
      scaled = PolicyGradient::apply(upstream, dlogps, saved[1]);
    } else if (upstream.is_cpu() && upstream.item<double>() == 1) {
      scaled = dlogps.to(saved[1].scalar_type());
    } else {
      scaled = (dlogps * upstream).to(saved[1].scalar_type());
    }
    return {scaled, {}, {}, {}, {}, {}};
  }
};

Computed compute_on_cpu(const PolicyBatch& batch, const PolicyObjective& objective,
                        const Normalizer& normalizer, bool with_gradient) {
  const detail::PolicyViews views(batch);
  Computed out;
  MutableArray dlogps;
  if (with_gradient) {
    out.dlogps = at::empty(batch.logps.sizes(), at::dtype(stored_type(batch.logps)));
    dlogps = detail::mutable_token_array(out.dlogps);
  }
  const PolicyTotals totals =
      policy_loss(views.arrays(), objective, normalizer, dlogps, torch_executor());
  const bool wide = batch.logps.scalar_type() == at::kDouble;
  out.loss = at::scalar_tensor(totals.loss, at::dtype(wide ? at::kDouble : at::kFloat));
  out.metrics.sums = at::empty({PolicyMetrics::kSums, 2}, at::dtype(at::kDouble));
  out.metrics.maxima = at::empty({PolicyMetrics::kMaxima}, at::dtype(at::kDouble));
  std::memcpy(out.metrics.sums.data_ptr(), totals.metrics.sums.data(), sizeof(totals.metrics.sums));
  std::memcpy(out.metrics.maxima.data_ptr(), totals.metrics.maxima.data(),
              sizeof(totals.metrics.maxima));
  return out;
}

LossOutput run(const PolicyBatch& unchecked, const PolicyObjective& objective,
               const Normalizer& normalizer, Compute compute) {
  const PolicyBatch batch = detail::checked("policy_loss", unchecked);
  return detail::with_value_errors([&] {
    check_objective("policy_loss", objective);
    LossOutput out;
    out.loss =
        PolicyLoss::apply(batch.logps, compute, &batch, &objective, &normalizer, &out.metrics);
    return out;
  });
}

}  // namespace

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
  if (batch.logps.defined() && !batch.logps.is_cpu()) {
    return detail::policy_loss_any_device(batch, objective, normalizer);
  }
  return run(batch, objective, normalizer, compute_on_cpu);
}

LossOutput detail::policy_loss_any_device(const PolicyBatch& batch,
                                          const PolicyObjective& objective,
                                          const Normalizer& normalizer) {
  return run(batch, objective, normalizer,
             [](const PolicyBatch& checked, const PolicyObjective& each, const Normalizer& counts,
                bool with_gradient) {
               TensorLoss loss = tensor_policy_loss(checked, each, counts, with_gradient);
               return Computed{loss.loss, loss.dlogps, loss.metrics};
             });
}

}  // namespace tether
