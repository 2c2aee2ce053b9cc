#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/min.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "testing/policy_checks.h"

// A clipped surrogate with a k3 penalty in plain torch, as a trainer would write it: right, and in
// pieces that peer_bugs_test.cc gets wrong one at a time.

namespace tether::plain {

inline constexpr double kLow = 0.2, kHigh = 0.28, kBeta = 0.1;

// What the loss reads, with safe values in masked slots and in float32 at least.
struct Inputs {
  at::Tensor mask, logps, old_logps, ref_logps, advantages;
};

inline at::Tensor widened(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

inline Inputs as_given(const PolicyBatch& batch) {
  return {widened(batch.response_mask), widened(batch.logps), widened(batch.old_logps),
          batch.ref_logps.defined() ? widened(batch.ref_logps) : at::Tensor(),
          widened(batch.advantages)};
}

inline Inputs selected(const PolicyBatch& batch) {
  Inputs in = as_given(batch);
  for (at::Tensor* each : {&in.logps, &in.old_logps, &in.ref_logps, &in.advantages}) {
    if (each->defined()) *each = at::where(in.mask != 0, *each, at::zeros_like(*each));
  }
  return in;
}

// Saturated before the exp, with the gradient left alive.
inline at::Tensor saturated(const at::Tensor& x) {
  return x.detach().clamp(-60, 60) + (x - x.detach());
}

inline at::Tensor surrogate_of_ratio(const at::Tensor& ratio, const at::Tensor& advantages) {
  return -at::min(ratio * advantages, ratio.clamp(1 - kLow, 1 + kHigh) * advantages);
}

inline at::Tensor surrogate(const Inputs& in) {
  return surrogate_of_ratio(saturated(in.logps - in.old_logps).exp(), in.advantages);
}

inline at::Tensor k3(const Inputs& in) {
  const at::Tensor u = saturated(in.ref_logps - in.logps);
  return u.expm1() - u;
}

inline at::Tensor token_losses(const Inputs& in) {
  const at::Tensor loss = surrogate(in);
  return in.ref_logps.defined() ? loss + kBeta * k3(in) : loss;
}

inline double tokens_of(const Inputs& in, const Normalizer& step) {
  const double tokens = step.policy ? *step.policy : in.mask.sum().item<double>();
  return tokens > 0 ? tokens : 1;
}

inline at::Tensor token_mean(const at::Tensor& losses, const Inputs& in, const Normalizer& step) {
  return (losses * in.mask).sum() / tokens_of(in, step) * step.world_size;
}

inline at::Tensor loss(const PolicyBatch& batch, const Normalizer& step) {
  const Inputs in = selected(batch);
  return token_mean(token_losses(in), in, step);
}

inline testing::PolicyTraits traits() { return {.clip = testing::ClipRange{kLow, kHigh}}; }

inline testing::PolicyTraits traits_with_penalty() {
  testing::PolicyTraits out = traits();
  out.needs_ref_logps = true;
  return out;
}

}  // namespace tether::plain
