#include "rl/policy/dro.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Dro, IsThePolicyGradientAndASquare) {
  const Dual<double> loss = QuadraticPull{.tau = 0.5}(token_at(std::exp(2), 3, -1));
  EXPECT_DOUBLE_EQ(loss.value, 3 + 0.25 * 4);
  EXPECT_DOUBLE_EQ(loss.grad, -3 + 0.5 * 2);
}

TEST(Dro, RestsWhereTheLogRatioIsAOverTau) {
  EXPECT_NEAR(QuadraticPull{.tau = 0.5}(token_at(std::exp(2), 1)).grad, 0, 1e-15);
}

// One answer of two tokens, u = 0.5 and 1: U = 1.5, L = -1 - 0.5 = -1.5.
TEST(Kimi, TakesTheSumsOfTheAnswer) {
  Batch<double> batch(1, 2);
  batch.mask = {1, 1};
  batch.logps = {-1, -0.5};
  batch.old_logps = {-1.5, -1.5};
  batch.advantages = {2, 2};
  expect_loss_and_slopes(batch, presets::kimi({.tau = 0.5}), 2 * 1.5 + 0.25 * 1.5 * 1.5,
                         {-2 + 0.5 * 1.5, -2 + 0.5 * 1.5});
}

}  // namespace
}  // namespace tether
