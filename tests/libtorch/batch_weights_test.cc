#include "libtorch/batch_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "libtorch/tether.h"
#include "tests/libtorch/message.h"

namespace tether {
namespace {

TEST(BatchWeights, AreLikeLogpsWithOneInMaskedSlots) {
  const at::Tensor logps = at::tensor({-1.f, -2.f, -3.f, -4.f}).view({2, 2});
  const at::Tensor mask = at::tensor({1., 1., 1., 0.}).view({2, 2});
  const at::Tensor entropies = at::tensor({0.5, 2., 1., 9.}).view({2, 2});
  const at::Tensor weights = batch_weights(
      {.logps = logps, .response_mask = mask, .entropies = entropies}, TopEntropy{.share = 0.5});
  const at::Tensor live = logps.detach().requires_grad_(true);
  EXPECT_FALSE(
      batch_weights({.logps = live, .response_mask = mask, .entropies = entropies}, TopEntropy{})
          .requires_grad());
  EXPECT_TRUE(at::equal(weights, at::tensor({0.f, 1.f, 1.f, 1.f}).view({2, 2})));
}

TEST(BatchWeights, AskForWhatTheRuleNeeds) {
  const at::Tensor logps = at::tensor({-1., -2.});
  const BatchWeightBatch batch{.logps = logps.view({1, 2}),
                               .response_mask = logps.view({1, 2}) < 0};
  EXPECT_EQ(message([&] { batch_weights(batch, KlCovPicks{}); }),
            "batch_weights: advantages must be given for kl_cov, got none");
  EXPECT_EQ(message([&] { batch_weights(batch, SecondMoment{.threshold = 0}); }),
            "batch_weights: old_logps must be given for m2po, got none");
}

// Of each rule by name, as the options of a trainer's command line choose it.
TEST(BatchWeights, AreFoundByName) {
  EXPECT_EQ(batch_weight_rule("top_entropy").needs().entropies, true);
  EXPECT_EQ(message([] { batch_weight_rule("cov"); }),
            "batch_weights: rule must be one of clip_cov, kl_cov, top_entropy, m2po, fipo, "
            "normalized_importance, turn_mean, got \"cov\"");
}

struct Halves {
  static constexpr BatchNeeds needs{};
  static constexpr auto fields() { return std::tuple{}; }
  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    for (size_t i = 0; i < tokens.size(); ++i) out[i] = 0.5;
  }
};

TEST(BatchWeights, ARuleMayBeOnesOwn) {
  const at::Tensor logps = at::tensor({-1., -2.}).view({1, 2});
  const at::Tensor weights = batch_weights({.logps = logps, .response_mask = logps < -1}, Halves{});
  EXPECT_TRUE(at::equal(weights, at::tensor({1., 0.5}).view({1, 2})));
}

// Value and gradients of the kernel and of torch's operations.
void expect_same_paths(const PolicyBatch& batch, const PolicyObjective& objective) {
  const auto run = [&](const auto& loss_of) {
    const at::Tensor logps = batch.logps.detach().clone().requires_grad_(true);
    const at::Tensor entropies = batch.entropies.detach().clone().requires_grad_(true);
    PolicyBatch live = batch;
    live.logps = logps;
    live.entropies = entropies;
    const LossOutput out = loss_of(live);
    out.loss.backward();
    return std::tuple{out.loss.item<double>(), logps.grad(), entropies.grad()};
  };
  const auto [loss, dlogps, dentropies] =
      run([&](const PolicyBatch& live) { return policy_loss(live, objective); });
  const auto [any, any_dlogps, any_dentropies] =
      run([&](const PolicyBatch& live) { return detail::policy_loss_any_device(live, objective); });
  EXPECT_NEAR(loss, any, 1e-14);
  EXPECT_LT((dlogps - any_dlogps).abs().max().item<double>(), 1e-14);
  EXPECT_LT((dentropies - any_dentropies).abs().max().item<double>(), 1e-14);
}

// W S + v beta K - e c H.
TEST(BatchWeights, OfEachTermAreTheSameOnEveryPath) {
  const at::Tensor logps = at::tensor({-1., -2., -0.5, -3.}).view({2, 2});
  const at::Tensor one = at::tensor({0.5, -1., 2., 0.25}).view({2, 2});
  const PolicyBatch batch{.logps = logps,
                          .advantages = one,
                          .response_mask = logps < 0,
                          .old_logps = logps - 0.25 * one,
                          .ref_logps = logps + 0.5 * one,
                          .entropies = one * one,
                          .rollout_logps = logps - 0.75,
                          .token_weights = one + 1,
                          .kl_weights = one - 1,
                          .entropy_weights = 2 * one};
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean}) {
    for (const KlReference reference :
         {KlReference::reference, KlReference::old, KlReference::rollout}) {
      PolicyObjective objective = presets::grpo(0.5);
      objective.level = level;
      objective.kl.correction = KlCorrection::level_ratio;
      objective.kl.reference = reference;
      objective.entropy.coefficient = 0.25;
      expect_same_paths(batch, objective);
      objective.kl.correction = KlCorrection::rollout_ratio;
      expect_same_paths(batch, objective);
      const auto metrics = policy_loss(batch, objective).metrics.to_host().to_map();
      EXPECT_NEAR(metrics.at("weight_mean"), 1.4375, 1e-15);
    }
  }
}

}  // namespace
}  // namespace tether
