#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "tests/testing/plain_losses.h"

// Wrong losses that trainers have shipped, rebuilt on the right one in plain_losses.h. Each must be
// caught by the property that names its fault; the right one must pass.

namespace tether {
namespace {

using plain::Inputs;
using testing::check_policy_loss;
using testing::PolicyLoss;
using testing::PolicyTraits;

// The token losses of `formula`, averaged as they should be.
template <class Formula>
PolicyLoss averaged(Formula formula) {
  return [formula](const PolicyBatch& batch, const Normalizer& step) {
    const Inputs in = plain::selected(batch);
    return plain::token_mean(formula(in), in, step);
  };
}

// 0 times NaN is NaN: a masked slot poisons the sum.
at::Tensor masked_by_multiplication(const PolicyBatch& batch, const Normalizer& step) {
  const Inputs in = plain::as_given(batch);
  return plain::token_mean(plain::token_losses(in), in, step);
}

// The value is masked, the gradient is not.
at::Tensor gradient_in_masked_slots(const PolicyBatch& batch, const Normalizer& step) {
  const at::Tensor leak = 1e-3 * plain::widened(batch.logps).sum();
  return plain::loss(batch, step) + (leak - leak.detach());
}

// Every micro-batch divides by its own tokens.
at::Tensor local_token_mean(const PolicyBatch& batch, const Normalizer&) {
  return plain::loss(batch, {});
}

// The step's tokens, but data-parallel averaging divides once more.
at::Tensor forgets_world_size(const PolicyBatch& batch, const Normalizer& step) {
  Normalizer one = step;
  one.world_size = 1;
  return plain::loss(batch, one);
}

at::Tensor divides_by_padded_width(const PolicyBatch& batch, const Normalizer& step) {
  const Inputs in = plain::selected(batch);
  const auto slots = static_cast<double>(std::max<int64_t>(in.mask.numel(), 1));
  return (plain::token_losses(in) * in.mask).sum() / slots * step.world_size;
}

at::Tensor divides_by_zero_tokens(const PolicyBatch& batch, const Normalizer& step) {
  const Inputs in = plain::selected(batch);
  const at::Tensor sum = (plain::token_losses(in) * in.mask).sum() * step.world_size;
  return step.policy ? sum / *step.policy : sum / in.mask.sum();
}

at::Tensor clamps_after_exp(const Inputs& in) {
  const at::Tensor ratio = (in.logps - in.old_logps).exp().clamp(0, 1e4);
  return plain::surrogate_of_ratio(ratio, in.advantages);
}

at::Tensor overflows(const Inputs& in) {
  return plain::surrogate_of_ratio((in.logps - in.old_logps).exp(), in.advantages);
}

at::Tensor clamp_kills_gradient(const Inputs& in) {
  const at::Tensor ratio = (in.logps - in.old_logps).clamp(-20, 20).exp();
  return plain::surrogate_of_ratio(ratio, in.advantages);
}

at::Tensor returns_the_unclipped(const Inputs& in) {
  return -plain::saturated(in.logps - in.old_logps).exp() * in.advantages;
}

at::Tensor swaps_epsilons(const Inputs& in) {
  const at::Tensor ratio = plain::saturated(in.logps - in.old_logps).exp();
  const at::Tensor clipped = ratio.clamp(1 - plain::kHigh, 1 + plain::kLow);
  return -at::min(ratio * in.advantages, clipped * in.advantages);
}

at::Tensor inverts_the_ratio(const Inputs& in) {
  return plain::surrogate_of_ratio(plain::saturated(in.old_logps - in.logps).exp(), in.advantages);
}

at::Tensor clamps_the_penalty(const Inputs& in) {
  return plain::surrogate(in) + plain::kBeta * plain::k3(in).clamp(-10, 10);
}

at::Tensor subtracts_the_penalty(const Inputs& in) {
  return plain::surrogate(in) - plain::kBeta * plain::k3(in);
}

at::Tensor penalty_without_gradient(const Inputs& in) {
  return plain::surrogate(in) + plain::kBeta * plain::k3(in).detach();
}

at::Tensor writes_into_logps(const PolicyBatch& batch, const Normalizer& step) {
  const at::Tensor loss = plain::loss(batch, step);
  const at::NoGradGuard guard;
  batch.logps.detach().sub_(batch.old_logps);
  return loss;
}

at::Tensor computes_in_the_inputs_precision(const PolicyBatch& batch, const Normalizer& step) {
  PolicyBatch narrow = batch;
  narrow.logps = (batch.logps - batch.old_logps).exp().log();
  narrow.old_logps = at::zeros_like(batch.old_logps);
  return plain::loss(narrow, step);
}

at::Tensor zero_without_requires_grad(const PolicyBatch& batch, const Normalizer& step) {
  const at::Tensor loss = plain::loss(batch, step);
  return loss.requires_grad() ? loss : at::zeros_like(loss);
}

// Takes memory for contiguous.
at::Tensor ignores_strides(const PolicyBatch& batch, const Normalizer& step) {
  PolicyBatch read = batch;
  read.advantages = at::from_blob(batch.advantages.data_ptr(), batch.advantages.sizes(),
                                  batch.advantages.options());
  return plain::loss(read, step);
}

// Packed rows are averaged as one long row.
at::Tensor packed_as_one_row(const PolicyBatch& batch, const Normalizer& step) {
  const Inputs in = plain::selected(batch);
  const at::Tensor terms = plain::token_losses(in) * in.mask;
  const at::Tensor mask = in.mask.dim() == 1 ? in.mask.unsqueeze(0) : in.mask;
  const at::Tensor n = mask.sum(1), sums = terms.view_as(mask).sum(1);
  const double rows = step.sequences.value_or((n > 0).sum().item<double>());
  const at::Tensor means = at::where(n > 0, sums / at::where(n > 0, n, 1), at::zeros_like(n));
  return means.sum() / std::max(rows, 1.0) * step.world_size;
}

// A fused loss that hands its stored gradient out whatever comes in from above.
class IgnoresUpstream : public torch::autograd::Function<IgnoresUpstream> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logps,
                            const PolicyBatch* batch, const Normalizer* step) {
    const at::AutoGradMode enabled(true);
    PolicyBatch inner = *batch;
    inner.logps = logps.detach().requires_grad_(true);
    const at::Tensor loss = plain::loss(inner, *step);
    context->save_for_backward({torch::autograd::grad({loss}, {inner.logps})[0]});
    return loss.detach();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list&) {
    return {context->get_saved_variables()[0], {}, {}};
  }
};

struct PeerBug {
  const char* name;
  PolicyLoss loss;
  const char* caught_by;
  PolicyTraits traits = plain::traits();
};

std::vector<PeerBug> peer_bugs() {
  const PolicyTraits penalty = plain::traits_with_penalty();
  PolicyTraits packed = plain::traits();
  packed.takes_offsets = true;
  const auto ignores_upstream = [](const PolicyBatch& batch, const Normalizer& step) {
    return IgnoresUpstream::apply(batch.logps, &batch, &step);
  };
  return {
      {"MaskedByMultiplication", masked_by_multiplication, "poison"},
      {"GradientInMaskedSlots", gradient_in_masked_slots, "poison"},
      {"LocalTokenMean", local_token_mean, "split"},
      {"ForgetsWorldSize", forgets_world_size, "ranks"},
      {"DividesByPaddedWidth", divides_by_padded_width, "padding_right"},
      {"DividesByZeroTokens", divides_by_zero_tokens, "empty"},
      {"ClampsAfterExp", averaged(clamps_after_exp), "finite"},
      {"Overflows", averaged(overflows), "finite"},
      {"ClampKillsGradient", averaged(clamp_kills_gradient), "pull_back"},
      {"ReturnsTheUnclipped", averaged(returns_the_unclipped), "clip"},
      {"SwapsEpsilons", averaged(swaps_epsilons), "clip"},
      {"InvertsTheRatio", averaged(inverts_the_ratio), "on_policy"},
      {"ClampsThePenalty", averaged(clamps_the_penalty), "kl_pull", penalty},
      {"SubtractsThePenalty", averaged(subtracts_the_penalty), "kl_pull", penalty},
      {"PenaltyWithoutGradient", averaged(penalty_without_gradient), "finite_difference", penalty},
      {"WritesIntoLogps", writes_into_logps, "inputs_unchanged"},
      {"ComputesInTheInputsPrecision", computes_in_the_inputs_precision, "half_precision"},
      {"ZeroWithoutRequiresGrad", zero_without_requires_grad, "no_grad"},
      {"IgnoresStrides", ignores_strides, "strides"},
      {"PackedAsOneRow", packed_as_one_row, "packed", packed},
      {"IgnoresUpstream", ignores_upstream, "upstream"},
  };
}

class PeerBugs : public ::testing::TestWithParam<PeerBug> {};

TEST_P(PeerBugs, AreCaughtByTheirProperty) {
  const auto report = check_policy_loss(GetParam().loss, GetParam().traits, {.batches = 6});
  const auto& property = report[GetParam().caught_by];
  EXPECT_EQ(property.outcome, testing::Outcome::fails) << report;
  EXPECT_LE(property.rows * property.columns, 4) << property.detail << "\n" << property.batch;
}

INSTANTIATE_TEST_SUITE_P(Rebuilt, PeerBugs, ::testing::ValuesIn(peer_bugs()),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(RightLosses, RaiseNoAlarm) {
  const auto report = check_policy_loss(plain::loss, plain::traits());
  EXPECT_TRUE(report.ok()) << report;
  const auto with_penalty = check_policy_loss(plain::loss, plain::traits_with_penalty());
  EXPECT_TRUE(with_penalty.ok()) << with_penalty;
}

TEST(RightLosses, RaiseNoAlarmForOtherSeeds) {
  for (uint64_t seed : {2, 3, 4}) {
    const auto report =
        check_policy_loss(plain::loss, plain::traits_with_penalty(), {.seed = seed, .batches = 6});
    EXPECT_TRUE(report.ok()) << report;
  }
}

}  // namespace
}  // namespace tether
