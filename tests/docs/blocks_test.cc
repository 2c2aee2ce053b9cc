// The C++ blocks of README.md and docs/: tests/docs/test_blocks.py looks for them here.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <libtorch/tether.h>
#include <testing/policy_checks.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace {

struct MySurrogate {
  double strength = 0.1;
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return -token.advantage * token.logp + strength * token.log_ratio * token.log_ratio;
  }
};

struct MyWeight {
  double high = 0.5;
  static constexpr tether::Traits traits{.needs_rollout_logps = true};
  template <class Number>
  TETHER_FORMULA Number measure(const tether::WeightToken<Number>& token) const {
    return abs(token.old_logp - token.rollout_logp);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const tether::WeightToken<Number>&, const Number& x) const {
    return tether::select(x > high, 0 * x, 0 * x + 1);
  }
};

struct TdError {
  double gamma = 1;
  tether::MaskGap gap = tether::MaskGap::carry;

  static constexpr tether::Traits traits{.needs_values = true};
  template <class Number>
  tether::Step<Number> step(const tether::RecursionToken<Number>& token) const {
    return {token.reward - token.value, Number{gamma}, Number{0}};
  }
};

// Two prompts, two answers each, of three tokens.
tether::PolicyBatch example() {
  const at::Tensor logps = (at::arange(1, 13, at::kDouble).reshape({4, 3}) / -10).requires_grad_();
  return {.logps = logps,
          .advantages = at::tensor({1.0, -1.0, 0.5, -0.5}, at::kDouble),
          .response_mask = at::ones({4, 3}),
          .old_logps = at::full({4, 3}, -0.6, at::kDouble),
          .ref_logps = at::full({4, 3}, -0.7, at::kDouble),
          .rollout_logps = at::full({4, 3}, -0.6 - std::log(1.5), at::kDouble)};
}

TEST(Blocks, OwnSurrogate) {
  const tether::PolicyBatch batch = example();
  auto objective = tether::presets::grpo(/*beta=*/0.04);
  objective.surrogate = MySurrogate{};
  const auto mine = tether::policy_loss(batch, objective);
  mine.loss.backward();

  const at::Tensor u = batch.logps.detach() - batch.old_logps;
  const at::Tensor d = batch.ref_logps - batch.logps.detach();
  const at::Tensor expected = -batch.advantages.unsqueeze(1) + 0.2 * u - 0.04 * at::expm1(d);
  EXPECT_TRUE(at::allclose(batch.logps.grad(), expected / 12, 1e-12, 1e-14));
}

TEST(Blocks, Weights) {
  const tether::PolicyBatch batch = example();
  const double plain = tether::policy_loss(batch, tether::presets::grpo()).loss.item<double>();
  auto objective = tether::presets::grpo();
  objective.weights = {{tether::TruncatedImportance{.high = 2}}};
  const auto weighted = tether::policy_loss(batch, objective);
  EXPECT_NEAR(weighted.loss.item<double>(), 1.5 * plain, 1e-15);
}

TEST(Blocks, WeightsOfTheBatch) {
  tether::PolicyBatch batch = example();
  batch.kl_weights = tether::batch_weights(
      {.logps = batch.logps, .response_mask = batch.response_mask, .advantages = batch.advantages},
      tether::KlCovPicks{.share = 0.3});
  const auto penalised = tether::policy_loss(batch, tether::presets::kl_cov());
  const at::Tensor u = (batch.logps.detach() - batch.old_logps).abs();
  const double expected = (u * batch.kl_weights).mean().item<double>();
  EXPECT_NEAR(penalised.metrics.to_map().at("kl"), expected, 1e-15);
  EXPECT_EQ(batch.kl_weights.sum().item<double>(), 3);
}

TEST(Blocks, OwnWeight) {
  tether::PolicyBatch batch = example();
  batch.rollout_logps[1][2] = -2;
  auto objective = tether::presets::grpo();
  objective.weights = {{MyWeight{}, tether::WeightLevel::sequence_max}};
  const auto kept = tether::policy_loss(batch, objective);
  EXPECT_DOUBLE_EQ(kept.metrics.to_map().at("weight_zero_fraction"), 0.25);

  objective.weights = {{tether::on_any_device(MyWeight{}), tether::WeightLevel::sequence_max}};
  const auto elsewhere = tether::detail::policy_loss_any_device(batch, objective);
  EXPECT_NEAR(elsewhere.loss.item<double>(), kept.loss.item<double>(), 1e-15);
}

TEST(Blocks, Advantages) {
  const at::Tensor rewards = at::tensor({0.0, 0.0, 1.0}, at::kDouble).reshape({1, 3});
  const at::Tensor values = at::tensor({0.5, 0.25, 0.75}, at::kDouble).reshape({1, 3});
  const at::Tensor response_mask = at::ones({1, 3});
  const tether::AdvantageBatch rows{
      .rewards = rewards, .values = values, .response_mask = response_mask};
  const auto [advantages, returns] = tether::advantage(rows, tether::Gae{.lambda = 0.95});
  EXPECT_TRUE(at::allclose(returns, advantages + values));
  EXPECT_DOUBLE_EQ(advantages[0][1].item<double>(), 0.5 + 0.95 * 0.25);
  const at::Tensor errors = tether::advantage(rows, TdError{.gamma = 0.99}).advantages;
  EXPECT_DOUBLE_EQ(errors[0][1].item<double>(), 0.99 * 0.75 - 0.25);
}

TEST(Blocks, Penalty) {
  auto penalised = tether::presets::dapo();
  penalised.kl = {.beta = 0.04,
                  .estimator = tether::K3{},
                  .gradient = tether::K2{},
                  .correction = tether::KlCorrection::none};
  const tether::PolicyBatch batch = example();
  const auto difference = tether::policy_loss(batch, penalised).loss -
                          tether::policy_loss(batch, tether::presets::dapo()).loss;
  const at::Tensor d = batch.ref_logps - batch.logps.detach();
  EXPECT_NEAR(difference.item<double>(), 0.04 * (d.expm1() - d).mean().item<double>(), 1e-14);
}

TEST(Blocks, DenominatorsOfTheStep) {
  const tether::PolicyBatch batch = example();
  const auto objective = tether::presets::dapo();
  const tether::Normalizer counts = tether::local_counts(batch, objective);
  const tether::Normalizer step{.policy = *counts.policy * 2,  // both halves are alike here
                                .kl = *counts.kl * 2,
                                .sequences = *counts.sequences * 2};
  const auto half = tether::policy_loss(batch, objective, step);
  EXPECT_DOUBLE_EQ(half.loss.item<double>() * 2,
                   tether::policy_loss(batch, objective).loss.item<double>());
}

TEST(Blocks, FromHiddenStates) {
  const at::Tensor hidden = at::randn({4, 3, 8}).requires_grad_();
  const at::Tensor weight = at::randn({20, 8}).requires_grad_();
  const at::Tensor targets = at::randint(20, {4, 3}, at::kLong);
  const tether::PolicyBatch tokens{.logps = {},  // made by linear_policy_loss
                                   .advantages = at::tensor({1.0f, -1.0f, 0.5f, -0.5f}),
                                   .response_mask = at::ones({4, 3})};
  auto [loss, metrics, logps, entropies] = tether::linear_policy_loss(
      hidden, {.weight = weight}, targets, tokens, tether::presets::dapo());
  loss.backward();
  EXPECT_TRUE(hidden.grad().defined() && weight.grad().defined());
  EXPECT_EQ(logps.sizes(), targets.sizes());
}

TEST(Blocks, ErrorsAreOneSentence) {
  tether::PolicyBatch wrong = example();
  wrong.old_logps = at::zeros({4, 2}, at::kDouble);
  std::string message;
  try {
    tether::policy_loss(wrong, tether::presets::ppo());
  } catch (const c10::ValueError& error) {
    message = error.what_without_backtrace();
  }
  EXPECT_EQ(message, "policy_loss: old_logps must be [4, 3] like logps, got [4, 2]");
}

// A clipped surrogate in plain torch.
at::Tensor my_loss(const at::Tensor& logps, const at::Tensor& old_logps,
                   const at::Tensor& advantages, const at::Tensor& response_mask,
                   std::optional<double> tokens_of_the_step, double factor) {
  const auto selected = [&](const at::Tensor& x) {
    const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
    return at::where(response_mask != 0, wide, at::zeros_like(wide));
  };
  const at::Tensor log_ratio = selected(logps) - selected(old_logps);
  const at::Tensor saturated = log_ratio.detach().clamp(-60, 60) + log_ratio - log_ratio.detach();
  const at::Tensor ratio = saturated.exp(), advantage = selected(advantages);
  const at::Tensor terms = -at::min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage);
  const at::Tensor weights = response_mask.to(terms.scalar_type());
  const double tokens = tokens_of_the_step.value_or(weights.sum().item<double>());
  return (terms * weights).sum() / std::max(tokens, 1e-12) * factor;
}

TEST(Blocks, OwnLossIsChecked) {
  const auto report = tether::testing::check_policy_loss(
      [](const tether::PolicyBatch& batch, const tether::Normalizer& step) {
        return my_loss(batch.logps, batch.old_logps, batch.advantages, batch.response_mask,
                       /*tokens_of_the_step=*/step.policy, /*factor=*/step.factor());
      },
      {.clip = tether::testing::ClipRange{.low = 0.2, .high = 0.2}});
  EXPECT_TRUE(report.ok()) << report;
}

TEST(Blocks, ForgottenWorldSizeIsFound) {
  const auto forgetful =
      tether::testing::check_policy_loss([](const tether::PolicyBatch& batch, const auto& step) {
        return my_loss(batch.logps, batch.old_logps, batch.advantages, batch.response_mask,
                       step.policy, /*factor=*/1);
      });
  EXPECT_EQ(forgetful.failed(), std::vector<std::string>{"ranks"});
  EXPECT_EQ(forgetful["ranks"].detail,
            "float32, [B, T] = [1, 1], 2 ranks, one of them without a token: loss -0.5, not -1");
}

}  // namespace
