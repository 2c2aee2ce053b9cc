#include "rl/critic/clipped_squared.h"

#include <gtest/gtest.h>

namespace tether {
namespace {

Dual<double> error_at(double value, double target, double clip_range = 0.5) {
  const ClippedSquaredError loss{.clip_range = clip_range};
  return loss(ValueToken<Dual<double>>{{value, 1}, {0}, {target}});
}

// V_old = 0, so that V is clipped to [-0.5, 0.5].
TEST(ClippedSquaredError, MatchesSixCasesByHand) {
  struct Row {
    double value, target, loss, grad;
  };
  for (const Row& row :
       {Row{0.25, 1, 0.28125, -0.75},  // inside: (1/4 - 1)^2 / 2
        Row{1, 2, 1.125, 0},           // above, and 0.5 is farther off: clipped
        Row{1, 0, 0.5, 1},             // above, and farther off itself: kept
        Row{-1, -2, 1.125, 0},         // below, likewise
        Row{-1, 0, 0.5, -1}, Row{1, 0.75, 0.03125, 0.25}}) {  // a tie: the unclipped error counts
    const Dual<double> loss = error_at(row.value, row.target);
    EXPECT_EQ(loss.value, row.loss) << row.value << " " << row.target;
    EXPECT_EQ(loss.grad, row.grad) << row.value << " " << row.target;
  }
}

TEST(ClippedSquaredError, AtABoundTheGradientIsTheOneInside) {
  EXPECT_EQ(error_at(0.5, 2).grad, -1.5);
  EXPECT_EQ(error_at(-0.5, -2).grad, 1.5);
}

TEST(ClippedSquaredError, AnInfiniteRangeIsOff) {
  EXPECT_EQ(error_at(1, 2, infinity).value, 0.5);
  EXPECT_EQ(error_at(1, 2, infinity).grad, -1);
}

}  // namespace
}  // namespace tether
