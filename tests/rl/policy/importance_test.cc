#include "rl/policy/importance.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/ppo.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

double weight_of(const TruncatedImportance& formula, double ratio) {
  const WeightToken<Constant<double>> token{{-1}, {-1}, {-1}, {-1 - std::log(ratio)}, {1}};
  return formula(token, formula.measure(token)).value;
}

TEST(TruncatedImportance, IsTheRatioToTheRolloutPolicyWithinItsBounds) {
  EXPECT_NEAR(weight_of({}, 1.5), 1.5, 1e-15);
  EXPECT_EQ(weight_of({}, 3), 2);
  EXPECT_NEAR(weight_of({}, 1e-3), 1e-3, 1e-15);
  EXPECT_EQ(weight_of({.low = 0.5, .high = 5}, 0.1), 0.5);
  EXPECT_EQ(weight_of({.low = 0.5, .high = 5}, 1e300), 5);
}

double masked_weight_of(const MaskedImportance& formula, double ratio) {
  const WeightToken<Constant<double>> token{{-1}, {-1}, {-1}, {-1 - std::log(ratio)}, {1}};
  return formula(token, formula.measure(token)).value;
}

TEST(MaskedImportance, IsTheRatioToTheRolloutPolicyOrNothing) {
  EXPECT_NEAR(masked_weight_of({}, 1.5), 1.5, 1e-15);
  EXPECT_NEAR(masked_weight_of({}, 4.9), 4.9, 1e-14);
  EXPECT_EQ(masked_weight_of({}, 5.1), 0);
  EXPECT_EQ(masked_weight_of({}, 0.49), 0);
  EXPECT_EQ(masked_weight_of({.low = 1, .high = 1}, 1), 1);  // the interval is closed
}

// Two answers, whose tokens the engine found e^0.1, e^-0.2 and e^0.3 times, and e^3 times less
// likely than the trainer.
Batch<double> mismatched() {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1.1, -0.8, -1.3, -4, 0, 0};
  return batch;
}

PolicyObjective weighted_ppo(WeightLevel level, const TruncatedImportance& formula = {}) {
  PolicyObjective out = presets::ppo();
  out.weights = {{formula, level}};
  return out;
}

// Losses and slopes of the tokens from token_at.h, over 4 tokens.
TEST(TruncatedImportance, WeighsEachTokensLossAndSlope) {
  Batch<double> batch = mismatched();
  const double a = std::exp(0.1), b = std::exp(-0.2), c = std::exp(0.3);
  expect_loss_and_slopes(batch, weighted_ppo(WeightLevel::token),
                         (-2.2 * a - 2.4 * b - 1.0 * c + 1.6 * 2) / 4,
                         {-2.2 * a / 4, 0, -1.0 * c / 4, 0, 0, 0});
}

TEST(TruncatedImportance, OfAnAnswerIsTheProductOfItsRatios) {
  Batch<double> batch = mismatched();
  const double row = std::exp(0.2);
  expect_loss_and_slopes(batch, weighted_ppo(WeightLevel::sequence_sum),
                         (-(2.2 + 2.4 + 1.0) * row + 1.6 * 2) / 4,
                         {-2.2 * row / 4, 0, -1.0 * row / 4, 0, 0, 0});
}

TEST(TruncatedImportance, OfAnAnswersMeanIsTheGeometricMeanOfItsRatios) {
  Batch<double> batch = mismatched();
  const double row = std::exp(0.2 / 3);
  expect_loss_and_slopes(batch, weighted_ppo(WeightLevel::sequence_mean),
                         (-(2.2 + 2.4 + 1.0) * row + 1.6 * 2) / 4,
                         {-2.2 * row / 4, 0, -1.0 * row / 4, 0, 0, 0});
}

TEST(TruncatedImportance, TakesTheSmallestOrLargestOfAnAnswer) {
  Batch<double> batch = mismatched();
  const double smallest = std::exp(-0.2), largest = std::exp(0.3);
  const auto loss = [](double row) { return (-(2.2 + 2.4 + 1.0) * row + 1.6 * 2) / 4; };
  EXPECT_NEAR(batch.run(weighted_ppo(WeightLevel::sequence_min)).loss, loss(smallest), 1e-15);
  EXPECT_NEAR(batch.run(weighted_ppo(WeightLevel::sequence_max)).loss, loss(largest), 1e-15);
}

}  // namespace
}  // namespace tether
