#include "rl/policy/linear.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Linear, IsTheRatioTimesTheAdvantageHoweverFar) {
  const Dual<double> loss = LinearRatio{}(token_at(8, 0.5));
  EXPECT_DOUBLE_EQ(loss.value, -4);
  EXPECT_DOUBLE_EQ(loss.grad, -4);
}

TEST(Linear, OverTheTokensOfTwoAnswers) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::linear(), (-2.2 - 3.0 - 1.0 + 1.0) / 4,
                         {-2.2 / 4, -3.0 / 4, -1.0 / 4, 1.0 / 4, 0, 0});
}

// As prime-rl has it: the probabilities moved by +0.0368, +0.1839, -0.1839 and -0.1839.
TEST(Linear, InABandOfProbabilities) {
  Batch<double> batch = two_answers();
  PolicyObjective objective = presets::linear();
  objective.weights = {{TvBand{.high = 0.1}}};
  expect_loss_and_slopes(batch, objective, -2.2 / 4, {-2.2 / 4, 0, 0, 0, 0, 0});
}

}  // namespace
}  // namespace tether
