#include "rl/policy/ppo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(PpoClip, MatchesFiveCasesByHand) {
  const PpoClip clip{.epsilon_low = 0.2, .epsilon_high = 0.3};  // unequal: a swap must fail
  struct Row {
    double ratio, advantage, value, grad;
  };
  for (const Row& row : {Row{1.1, +2, -2.2, -2.2},     // inside the region
                         Row{1.5, +2, -2.6, +0.0},     // too likely and good: clipped
                         Row{1.5, -2, +3.0, +3.0},     // too likely and bad: kept, pushes back
                         Row{0.5, +2, -1.0, -1.0},     // too rare and good: kept
                         Row{0.5, -2, +1.6, +0.0}}) {  // too rare and bad: clipped
    const auto loss = clip(token_at(row.ratio, row.advantage));
    EXPECT_DOUBLE_EQ(loss.value, row.value) << "ratio " << row.ratio << ", A " << row.advantage;
    EXPECT_DOUBLE_EQ(loss.grad, row.grad) << "ratio " << row.ratio << ", A " << row.advantage;
  }
}

TEST(PpoClip, DualClipBoundsTheLossOfBadTokensOnly) {
  const PpoClip clip{.dual_clip = 3};
  const auto beyond = clip(token_at(5, -2));
  EXPECT_EQ(beyond.value, 6);
  EXPECT_EQ(beyond.grad, 0);
  EXPECT_DOUBLE_EQ(clip(token_at(2.5, -2)).grad, 5);
  EXPECT_DOUBLE_EQ(clip(token_at(0.1, 2)).grad, -0.2);
  EXPECT_EQ(clip(token_at(5, 0)).value, 0);
}

TEST(PpoClip, AtABoundTheGradientIsTheOneInside) {
  // exp(0) = 1 exactly: epsilon 0 puts both bounds there.
  const PpoClip clip{.epsilon_low = 0, .epsilon_high = 0};
  EXPECT_EQ(clip(token_at(1, +2)).grad, -2);
  EXPECT_EQ(clip(token_at(1, -2)).grad, +2);
}

TEST(PpoClip, ARunawayTokenIsStillPulledBack) {
  const PpoClip clip;
  const auto loss = clip(token_at(infinity, -1));
  EXPECT_TRUE(std::isfinite(loss.value));
  EXPECT_GT(loss.grad, 1e200);
  EXPECT_EQ(clip(token_at(infinity, +1)).grad, 0);
}

// (-2.2 - 2.4 - 1.0 + 1.6) / 4
TEST(Ppo, IsTheMeanOverTheTokensOfTheBatch) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::ppo(), -1, {-0.55, 0, -0.25, 0, 0, 0});
}

// Ratio 4 and A = -2: a loss of 6, not 8.
TEST(PpoDualClip, ABadTokenPullsWithAtMostThreeTimesItsAdvantage) {
  Batch<double> batch(1, 1);
  batch.mask = {1};
  batch.logps = {std::log(4)};
  batch.advantages = {-2};
  expect_loss_and_slopes(batch, presets::ppo(), 8, {8});
  expect_loss_and_slopes(batch, presets::ppo_dual_clip(), 6, {0});
}

}  // namespace
}  // namespace tether
