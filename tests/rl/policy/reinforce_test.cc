#include "rl/policy/reinforce.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Reinforce, IsMinusAdvantageTimesLogp) {
  for (const double A : {+2.0, -3.0, 0.0}) {
    const auto loss = Reinforce{}(token_at(1, A, -0.5));
    EXPECT_EQ(loss.value, 0.5 * A);
    EXPECT_EQ(loss.grad, -A);
  }
}

TEST(Reinforce, DoesNotLookAtTheOldPolicy) {
  EXPECT_EQ(Reinforce{}(token_at(9, 2, -0.5)).value, Reinforce{}(token_at(1, 2, -0.5)).value);
  EXPECT_EQ(Reinforce{}(token_at(9, 2, -0.5)).grad, -2);
}

// logp = -1, -2, -3 with A = 2 and -0.5 with A = -2: (2 + 4 + 6 - 1) / 4.
TEST(Reinforce, ThePresetIsTheMeanOverTheTokensOfTheBatch) {
  Batch<double> batch = two_answers();
  batch.logps = {-1, -2, -3, -0.5, 0, 0};
  expect_loss_and_slopes(batch, presets::reinforce(), 2.75, {-0.5, -0.5, -0.5, 0.5, 0, 0});
}

}  // namespace
}  // namespace tether
