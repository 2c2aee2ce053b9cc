#include "bench/eager.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace tether::bench {

EagerMetrics eager_ppo(const at::Tensor& logps, const at::Tensor& old_logps,
                       const at::Tensor& advantages, const at::Tensor& response_mask) {
  constexpr double kEpsilon = 0.2;
  const at::Tensor mask = response_mask.to(logps.scalar_type());
  const at::Tensor tokens = mask.sum();
  const auto masked_mean = [&](const at::Tensor& x) { return (x * mask).sum() / tokens; };

  const at::Tensor log_ratio = logps - old_logps;
  const at::Tensor ratio = log_ratio.exp();
  const at::Tensor unclipped = ratio * advantages;
  const at::Tensor clipped = ratio.clamp(1 - kEpsilon, 1 + kEpsilon) * advantages;
  const at::Tensor loss = masked_mean(-at::min(unclipped, clipped));
  loss.backward();

  const at::NoGradGuard no_grad;
  const at::Tensor clip_fraction = masked_mean((clipped < unclipped).to(mask.scalar_type()));
  const at::Tensor approx_kl = masked_mean((ratio - 1) - log_ratio);
  return {loss.item<double>(), clip_fraction.item<double>(), approx_kl.item<double>()};
}

TokenLogps by_log_softmax(const at::Tensor& logits, const at::Tensor& targets) {
  const at::Tensor log_p = at::log_softmax(logits.to(at::kFloat), -1);
  return {.logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
          .entropies = -(log_p.exp() * log_p).sum(-1)};
}

}  // namespace tether::bench
