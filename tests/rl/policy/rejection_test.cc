#include "rl/policy/rejection.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/ppo.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

double weight_of(const RatioGate& formula, double ratio) {
  const WeightToken<Constant<double>> token{{-1}, {-1}, {-1}, {-1 - std::log(ratio)}, {1}};
  return formula(token, formula.measure(token)).value;
}

TEST(RatioGate, IsOneWithinItsBounds) {
  EXPECT_EQ(weight_of({}, 0.51), 1);
  EXPECT_EQ(weight_of({}, 1.99), 1);
  EXPECT_EQ(weight_of({}, 0.49), 0);
  EXPECT_EQ(weight_of({}, 2.01), 0);
  EXPECT_EQ(weight_of({.low = 1, .high = 1}, 1), 1);  // the interval is closed
}

// Losses and slopes of the tokens from token_at.h; the second token and the second answer leave, so
// the mean is over two tokens.
TEST(RatioGate, ShrinksTheMean) {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1.1, 2, -1.3, -4, 0, 0};
  PolicyObjective objective = presets::ppo();
  objective.weights = {{RatioGate{}}};
  expect_loss_and_slopes(batch, objective, (-2.2 - 1.0) / 2, {-1.1, 0, -0.5, 0, 0, 0});
  EXPECT_EQ(batch.run(objective).metrics.to_map().at("tokens"), 2);
}

// One impossible token vetoes its answer.
TEST(RatioGate, OfTheSmallestIsAVeto) {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1, 11, -1, -1, 0, 0};
  PolicyObjective objective = presets::ppo();
  objective.weights = {{RatioGate{.low = 1e-4, .high = 1e4}, WeightLevel::sequence_min}};
  expect_loss_and_slopes(batch, objective, 1.6, {0, 0, 0, 0, 0, 0});
}

}  // namespace
}  // namespace tether
