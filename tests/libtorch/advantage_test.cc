#include "libtorch/advantage.h"

#include <gtest/gtest.h>
#include <torch/types.h>

#include <cmath>
#include <string>

namespace tether {
namespace {

GaeBatch random_batch(int64_t rows, int64_t columns, at::ScalarType dtype = at::kDouble) {
  torch::manual_seed(5);
  const auto options = at::dtype(dtype);
  const at::Tensor mask = torch::rand({rows, columns}) > 0.2;
  const at::Tensor poison = mask.logical_not();
  return {.rewards = torch::randn({rows, columns}, options).masked_fill(poison, NAN),
          .values = torch::randn({rows, columns}, options).masked_fill(poison, NAN),
          .response_mask = mask,
          .bootstrap = torch::randn({rows}, options)};
}

// The recursion as people write it, a column at a time, over all rows: verl's, with carry.
AdvantagesAndReturns by_columns(const GaeBatch& batch, double gamma, double lambda) {
  const at::Tensor mask = batch.response_mask.to(at::kDouble);
  const at::Tensor rewards = batch.rewards.nan_to_num(), values = batch.values.nan_to_num();
  at::Tensor next_value = batch.bootstrap, last = torch::zeros_like(batch.bootstrap);
  std::vector<at::Tensor> columns;
  for (int64_t t = rewards.size(1) - 1; t >= 0; --t) {
    const at::Tensor m = mask.select(1, t), value = values.select(1, t);
    const at::Tensor delta = rewards.select(1, t) + gamma * next_value - value;
    const at::Tensor advantage = delta + gamma * lambda * last;
    next_value = m * value + (1 - m) * next_value;
    last = m * advantage + (1 - m) * last;
    columns.insert(columns.begin(), m * advantage);
  }
  const at::Tensor advantages = torch::stack(columns, 1);
  return {advantages, mask * (advantages + values)};
}

TEST(GaeFace, EqualsTheLoopOverColumns) {
  const GaeBatch batch = random_batch(6, 300);
  const AdvantagesAndReturns out =
      generalized_advantage_estimation(batch, {.gamma = 0.99, .lambda = 0.95});
  const AdvantagesAndReturns expected = by_columns(batch, 0.99, 0.95);
  EXPECT_TRUE(at::allclose(out.advantages, expected.advantages, 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(out.returns, expected.returns, 1e-12, 1e-12));
}

TEST(GaeFace, TypesStridesAndPackingGiveTheSame) {
  const GaeBatch batch = random_batch(5, 40);
  const Gae options{.gamma = 0.9, .lambda = 0.8};
  const at::Tensor expected = generalized_advantage_estimation(batch, options).advantages;
  GaeBatch strided = batch;
  strided.rewards = batch.rewards.t().contiguous().t();
  strided.response_mask = batch.response_mask.to(at::kLong);
  strided.lambdas = at::full({5}, 0.8, at::kDouble);
  EXPECT_TRUE(
      at::equal(generalized_advantage_estimation(strided, {.gamma = 0.9}).advantages, expected));
  GaeBatch packed = batch;
  packed.rewards = batch.rewards.reshape({-1});
  packed.values = batch.values.reshape({-1});
  packed.response_mask = batch.response_mask.reshape({-1});
  packed.offsets = at::arange(0, 201, 40, at::kInt);
  EXPECT_TRUE(at::equal(generalized_advantage_estimation(packed, options).advantages,
                        expected.reshape({-1})));
  const GaeBatch narrow = random_batch(5, 40, at::kFloat);
  EXPECT_EQ(generalized_advantage_estimation(narrow).returns.scalar_type(), at::kFloat);
}

template <class Change>
std::string error_of(Change change) {
  GaeBatch batch = random_batch(2, 3);
  change(batch);
  try {
    generalized_advantage_estimation(batch);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(GaeFace, BadInputGetsOneClearError) {
  using B = GaeBatch;
  const std::string name = "generalized_advantage_estimation: ";
  EXPECT_EQ(error_of([](B& b) { b.rewards = at::Tensor(); }),
            name + "rewards must be given, got none");
  EXPECT_EQ(error_of([](B& b) { b.values = torch::zeros({2, 4}); }),
            name + "values must be [2, 3] like rewards, got [2, 4]");
  EXPECT_EQ(error_of([](B& b) { b.bootstrap = torch::zeros({3}); }),
            name + "bootstrap must be [2], got [3]");
  EXPECT_EQ(error_of([](B& b) { b.values = torch::zeros({2, 3}).requires_grad_(); }),
            name +
                "values must not require grad, got a tensor that does. It is a constant of the "
                "loss: pass values.detach()");
  EXPECT_EQ(error_of([](B& b) { b.truncated = torch::zeros({2, 3}, at::kBool); }),
            name + "truncation_values must be given, got none");
}

TEST(AdvantageFace, TakesAnyRecursion) {
  const AdvantageBatch batch = random_batch(5, 40);
  const Gae options{.gamma = 0.9, .lambda = 0.8};
  const AdvantagesAndReturns typed = generalized_advantage_estimation(batch, options);
  const AdvantagesAndReturns named = advantage(batch, options);
  EXPECT_TRUE(at::equal(named.advantages, typed.advantages));
  EXPECT_TRUE(at::equal(named.returns, typed.returns));
  const at::Tensor returns = advantage(batch, DiscountedReturns{.gamma = 0.9}).returns;
  EXPECT_TRUE(at::equal(returns, discounted_returns({.rewards = batch.rewards,
                                                     .response_mask = batch.response_mask,
                                                     .bootstrap = batch.bootstrap},
                                                    {.gamma = 0.9})));
}

struct Centred {
  NanReward nan_reward = NanReward::error;

  static constexpr Traits traits{.needs_lengths = true};
  Group::Number operator()(const Group& group, int64_t i) const {
    return group.length[i] * (group.deviation(i) - group.mean);
  }
};

TEST(AdvantageFace, TakesAnyRuleOfGroups) {
  const at::Tensor rewards = torch::tensor({1.0f, 5.0f, 3.0f, 9.0f}),
                   ids = torch::tensor({4, 7, 4, 7});
  const at::Tensor lengths = torch::tensor({10, 1, 100, 2});
  const at::Tensor expected = torch::tensor({-10.0f, -2.0f, 100.0f, 4.0f});
  const GroupBatch batch{.rewards = rewards, .group_ids = ids, .lengths = lengths};
  EXPECT_TRUE(at::equal(advantage(batch, Centred{}), expected));
  GroupBatch fractional = batch;
  fractional.lengths = lengths.to(at::kBFloat16);
  EXPECT_TRUE(at::equal(advantage(fractional, Centred{}), expected));
  EXPECT_TRUE(at::equal(advantage({.rewards = rewards, .group_size = 2}, GroupAdvantage{}),
                        group_advantage(rewards, 2)));

  const auto error = [&](const GroupBatch& wrong) {
    try {
      advantage(wrong, Centred{});
    } catch (const c10::Error& thrown) {
      return std::string(thrown.what_without_backtrace());
    }
    return std::string("no error");
  };
  EXPECT_EQ(error({.rewards = rewards, .group_ids = ids}),
            "advantage: lengths must be given, got none");
  EXPECT_EQ(error({.rewards = rewards, .group_ids = ids, .lengths = lengths.to(at::kBool)}),
            "advantage: lengths must be floating or integer, got bool");
  EXPECT_EQ(error({.rewards = rewards, .group_ids = ids, .lengths = torch::ones({3})}),
            "advantage: lengths must be [4] like rewards, got [3]");
  EXPECT_EQ(error({.rewards = rewards, .group_ids = ids, .lengths = -lengths}),
            "advantage: lengths must be at least 0 and finite, got -10 at [0]");
  EXPECT_EQ(error({.rewards = rewards, .lengths = lengths}),
            "advantage: group_size must be at least 1, got 0");
}

}  // namespace
}  // namespace tether
