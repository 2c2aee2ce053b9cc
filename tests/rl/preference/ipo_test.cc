#include "rl/preference/ipo.h"

#include <gtest/gtest.h>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// beta = 1/4: the target is 2. Gaps of 3, 1 and -1 are off by 1, -1 and -3; by the gap twice that.
TEST(SquarePair, PullsTheGapToItsTargetFromBothSides) {
  struct Row {
    double chosen, value, grad;
  };
  for (const Row& row : {Row{3.5, 1, +2}, Row{1.5, 1, -2}, Row{-0.5, 9, -6}, Row{2.5, 0, 0}}) {
    const auto loss = SquarePair{}(pair_at(row.chosen, 0.5, 0.25));
    EXPECT_EQ(loss.value, row.value) << row.chosen;
    EXPECT_EQ(loss.grad[0], row.grad) << row.chosen;
    EXPECT_EQ(loss.grad[1], -row.grad) << row.chosen;
  }
}

TEST(Ipo, ThePresetScoresAnswersByTheMeanOfTheirTokens) {
  const PreferenceObjective objective = presets::ipo(0.3);
  EXPECT_EQ(objective.score, PairScore::mean);
  EXPECT_EQ(objective.beta, 0.3);
  EXPECT_TRUE(objective.reference);
}

}  // namespace
}  // namespace tether
