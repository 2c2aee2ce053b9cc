#include "libtorch/generalized_advantage.h"

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

}  // namespace
}  // namespace tether
