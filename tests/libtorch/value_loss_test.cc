#include "libtorch/value_loss.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include <cmath>
#include <string>

namespace tether {
namespace {

ValueBatch random_batch(at::ScalarType dtype = at::kDouble) {
  torch::manual_seed(6);
  const auto options = at::dtype(dtype);
  const at::Tensor mask = torch::rand({4, 30}) > 0.2;
  const at::Tensor values = torch::randn({4, 30}, options);
  return {.values = values.clone().requires_grad_(),
          .returns = torch::randn({4, 30}, options).masked_fill(mask.logical_not(), NAN),
          .response_mask = mask,
          .old_values = values + 0.3 * torch::randn({4, 30}, options)};
}

TEST(ValueLossFace, EqualsThePlainExpressionInValueAndGradient) {
  const ValueBatch batch = random_batch();
  const at::Tensor values = batch.values.detach().clone().requires_grad_();
  const at::Tensor target = batch.returns.nan_to_num();
  const at::Tensor clipped =
      at::min(at::max(values, batch.old_values - 0.2), batch.old_values + 0.2);
  const at::Tensor squares = at::max((values - target).square(), (clipped - target).square());
  const at::Tensor plain = 0.5 * (squares * batch.response_mask).sum() / batch.response_mask.sum();
  const ValueOutput out = value_loss(batch);
  EXPECT_NEAR(out.loss.item<double>(), plain.item<double>(), 1e-14);
  const at::Tensor gradient = torch::autograd::grad({3 * out.loss}, {batch.values}, {}, true)[0];
  // At a tie of the two errors torch's max halves the gradient twice, which is the same.
  EXPECT_TRUE(
      at::allclose(gradient, 3 * torch::autograd::grad({plain}, {values})[0], 1e-12, 1e-15));
  const at::Tensor once = torch::autograd::grad({out.loss}, {batch.values}, {}, true, true)[0];
  EXPECT_THROW(torch::autograd::grad({once.sum()}, {batch.values}), c10::Error);
}

// (V - R)^4, a formula of a user's own.
struct Fourth {
  template <class Number>
  TETHER_FORMULA Number operator()(const ValueToken<Number>& token) const {
    const Number error = token.value - token.target;
    return error * error * error * error;
  }
};

TEST(ValueLossFace, EveryDevicePathEqualsTheKernel) {
  std::vector<ValueObjective> objectives;
  for (const ValueRow& row : kValueCatalogue) objectives.push_back(row.preset());
  objectives.push_back({.loss = on_any_device(Fourth{})});
  for (ValueObjective& objective : objectives) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      objective.aggregation = sequence_mean_token_mean();
      const ValueBatch batch = random_batch(dtype);
      const double tolerance = dtype == at::kDouble ? 1e-13 : 1e-5;
      const ValueOutput kernel = value_loss(batch, objective, {.policy = 40, .sequences = 7});
      const ValueOutput tensors =
          detail::value_loss_any_device(batch, objective, {.policy = 40, .sequences = 7});
      EXPECT_NEAR(kernel.loss.item<double>(), tensors.loss.item<double>(), tolerance);
      const auto gradient = [&](const at::Tensor& loss) {
        return torch::autograd::grad({loss}, {batch.values}, {}, true)[0];
      };
      EXPECT_TRUE(
          at::allclose(gradient(kernel.loss), gradient(tensors.loss), tolerance, tolerance));
      const auto expected = kernel.metrics.to_map();
      for (const auto& [name, value] : tensors.metrics.to_map()) {
        EXPECT_NEAR(value, expected.at(name), 10 * tolerance) << name;
      }
    }
  }
}

TEST(ValueLossFace, EveryDevicePathHasTheNanOfTheKernel) {
  for (at::Tensor ValueBatch::* array :
       {&ValueBatch::values, &ValueBatch::returns, &ValueBatch::old_values}) {
    for (const double broken : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      ValueBatch batch = random_batch(at::kDouble);
      batch.response_mask = at::ones_like(batch.response_mask);
      batch.values = at::nan_to_num(batch.values.detach(), 0);
      batch.returns = at::nan_to_num(batch.returns, 0);
      batch.old_values = at::nan_to_num(batch.old_values, 0);
      (batch.*array).select(0, 1).select(0, 2) = broken;
      const auto want = value_loss(batch, {}).metrics.to_host();
      const auto got = detail::value_loss_any_device(batch, {}, {}).metrics.to_host();
      for (size_t i = 0; i < want.sums.size(); ++i) {
        EXPECT_EQ(std::isnan(got.sums[i]), std::isnan(want.sums[i])) << i;
        EXPECT_FALSE(std::isinf(got.sums[i])) << i;
      }
    }
  }
}

TEST(ValueLossFace, WhiteningOfPackedAndPaddedTokens) {
  const ValueBatch batch = random_batch(at::kFloat);
  const at::Tensor out = whiten(batch.returns, batch.response_mask, {.epsilon = 0});
  const at::Tensor active = out.masked_select(batch.response_mask);
  EXPECT_NEAR(active.mean().item<double>(), 0, 1e-6);
  EXPECT_NEAR(active.var().item<double>(), 1, 1e-5);
  EXPECT_EQ(out.masked_select(batch.response_mask.logical_not()).abs().sum().item<double>(), 0);
  EXPECT_TRUE(at::allclose(
      whiten(batch.returns.reshape({-1}), batch.response_mask.reshape({-1}), {.epsilon = 0}),
      out.reshape({-1})));
}

template <class Change>
std::string error_of(Change change) {
  ValueBatch batch = random_batch();
  change(batch);
  try {
    value_loss(batch);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(ValueLossFace, BadInputGetsOneClearError) {
  using B = ValueBatch;
  EXPECT_EQ(error_of([](B& b) { b.values = at::Tensor(); }),
            "value_loss: values must be given, got none");
  EXPECT_EQ(error_of([](B& b) { b.returns = torch::zeros({4, 29}); }),
            "value_loss: returns must be [4, 30] like values, got [4, 29]");
  EXPECT_EQ(error_of([](B& b) { b.values = torch::zeros({120}); }),
            "value_loss: values must be [B, T], or [N] with offsets, got [120]");
}

}  // namespace
}  // namespace tether
