#include "rl/preference/dpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// e^x = 3: sigmoid(x) = 3/4, sigmoid(-x) = 1/4. d x / d chosen = beta.
TEST(LogisticPair, MatchesBothOrdersByHand) {
  const double gap = std::log(3) / 0.5;
  const auto right = LogisticPair{}(pair_at(gap - 1, -1, 0.5));
  EXPECT_DOUBLE_EQ(right.value, std::log(4.0 / 3));
  EXPECT_DOUBLE_EQ(right.grad[0], -0.5 / 4);
  EXPECT_DOUBLE_EQ(right.grad[1], +0.5 / 4);
  const auto wrong = LogisticPair{}(pair_at(-1, gap - 1, 0.5));
  EXPECT_DOUBLE_EQ(wrong.value, std::log(4));
  EXPECT_DOUBLE_EQ(wrong.grad[0], -0.5 * 3 / 4);
  EXPECT_DOUBLE_EQ(wrong.grad[1], +0.5 * 3 / 4);
}

// -0.9 log(3/4) - 0.1 log(1/4), by x -1/4 + 0.1.
TEST(LogisticPair, AShareOfTheLabelsIsTakenForFlipped) {
  const LogisticPair smoothed{.label_smoothing = 0.1};
  const auto loss = smoothed(pair_at(std::log(3), 0, 1));
  EXPECT_DOUBLE_EQ(loss.value, 0.9 * std::log(4.0 / 3) + 0.1 * std::log(4));
  EXPECT_NEAR(loss.grad[0], -0.15, 1e-16);
  EXPECT_NEAR(loss.grad[1], +0.15, 1e-16);
}

// sigmoid(x) = 0.9 at x = log 9; beyond it the pair is pulled together.
TEST(LogisticPair, IsLeastWhereTheModelBelievesTheLabelsAsMuchAsTheyDeserve) {
  const LogisticPair smoothed{.label_smoothing = 0.1};
  EXPECT_NEAR(smoothed(pair_at(std::log(9), 0, 1)).grad[0], 0, 1e-16);
  EXPECT_LT(smoothed(pair_at(std::log(9) - 0.1, 0, 1)).grad[0], 0);
  EXPECT_GT(smoothed(pair_at(std::log(9) + 0.1, 0, 1)).grad[0], 0);
}

TEST(LogisticPair, APairThatRanAwayIsFiniteAndPulledBack) {
  const auto loss = LogisticPair{}(pair_at(-1e6, 1e6, 0.1));
  EXPECT_DOUBLE_EQ(loss.value, 2e5);
  EXPECT_DOUBLE_EQ(loss.grad[0], -0.1);
  EXPECT_DOUBLE_EQ(loss.grad[1], +0.1);
}

TEST(Dpo, PresetsAreTheLogisticLossOfSums) {
  for (const PreferenceObjective& each : {presets::dpo(0.3), presets::cdpo(0.3, 0.2)}) {
    EXPECT_EQ(each.score, PairScore::sum);
    EXPECT_NE(each.link.target<ReverseKl>(), nullptr);
    EXPECT_TRUE(each.reference);
    EXPECT_EQ(each.beta, 0.3);
  }
  EXPECT_EQ(presets::dpo().loss.target<LogisticPair>()->label_smoothing, 0);
  EXPECT_EQ(presets::cdpo(0.3, 0.2).loss.target<LogisticPair>()->label_smoothing, 0.2);
}

}  // namespace
}  // namespace tether
