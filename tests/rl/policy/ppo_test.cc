#include "rl/policy/ppo.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

Token<Dual<double>, Constant<double>> token_at(double log_ratio, double advantage) {
  const Dual<double> number{log_ratio, 1};
  return {{-1 + log_ratio, 1}, number, exp(number), {advantage}, {-1}, {-1}};
}

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
    const auto loss = clip(token_at(std::log(row.ratio), row.advantage));
    EXPECT_DOUBLE_EQ(loss.value, row.value) << "ratio " << row.ratio << ", A " << row.advantage;
    EXPECT_DOUBLE_EQ(loss.grad, row.grad) << "ratio " << row.ratio << ", A " << row.advantage;
  }
}

TEST(PpoClip, DualClipBoundsTheLossOfBadTokensOnly) {
  const PpoClip clip{.dual_clip = 3};
  const auto beyond = clip(token_at(std::log(5), -2));
  EXPECT_EQ(beyond.value, 6);
  EXPECT_EQ(beyond.grad, 0);
  EXPECT_DOUBLE_EQ(clip(token_at(std::log(2.5), -2)).grad, 5);
  EXPECT_DOUBLE_EQ(clip(token_at(std::log(0.1), 2)).grad, -0.2);
  EXPECT_EQ(clip(token_at(std::log(5), 0)).value, 0);
}

TEST(PpoClip, AtABoundTheGradientIsTheOneInside) {
  // exp(0) = 1 exactly: epsilon 0 puts both bounds there.
  const PpoClip clip{.epsilon_low = 0, .epsilon_high = 0};
  EXPECT_EQ(clip(token_at(0, +2)).grad, -2);
  EXPECT_EQ(clip(token_at(0, -2)).grad, +2);
}

TEST(PpoClip, ARunawayTokenIsStillPulledBack) {
  const PpoClip clip;
  const auto loss = clip(token_at(1e4, -1));
  EXPECT_TRUE(std::isfinite(loss.value));
  EXPECT_GT(loss.grad, 1e200);
  EXPECT_EQ(clip(token_at(1e4, +1)).grad, 0);
}

}  // namespace
}  // namespace tether
