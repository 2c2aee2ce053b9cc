#include "rl/preference/hinge.h"

#include <gtest/gtest.h>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// x = (chosen - 1) / 2: 0.5 and -1 are short of the margin, 1 is on it, 2 beyond.
TEST(HingePair, EndsAtAMarginOfOne) {
  struct Row {
    double chosen, value, grad;
  };
  for (const Row& row : {Row{2, 0.5, -0.5}, Row{-1, 2, -0.5}, Row{3, 0, 0}, Row{5, 0, 0}}) {
    const auto loss = HingePair{}(pair_at(row.chosen, 1, 0.5));
    EXPECT_EQ(loss.value, row.value) << row.chosen;
    EXPECT_EQ(loss.grad[0], row.grad) << row.chosen;
    EXPECT_EQ(loss.grad[1], -row.grad) << row.chosen;
  }
}

TEST(Hinge, ThePresetScoresAnswersByTheirSums) {
  const PreferenceObjective objective = presets::hinge(0.3);
  EXPECT_EQ(objective.score, PairScore::sum);
  EXPECT_EQ(objective.beta, 0.3);
  EXPECT_TRUE(objective.reference);
}

}  // namespace
}  // namespace tether
