#include "rl/policy/topr.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Topr, WeighsBadTokensAloneByTheirRatio) {
  const TaperedReinforce formula{.weight_pos = 0.5, .weight_neg = 2};
  EXPECT_DOUBLE_EQ(formula(token_at(0.25, 3, -1)).value, 1.5);
  EXPECT_DOUBLE_EQ(formula(token_at(0.25, 3)).grad, -1.5);
  EXPECT_DOUBLE_EQ(formula(token_at(0.25, -3, -1)).value, -1.5);
  EXPECT_DOUBLE_EQ(formula(token_at(0.25, -3)).grad, 1.5);
  EXPECT_DOUBLE_EQ(formula(token_at(4, -3)).grad, 6);  // at most 1
}

// The ratio of the first answer is 0.825, which nothing looks at; of the second 0.5.
TEST(Topr, TakesAnswersAsOneAction) {
  Batch<double> batch = two_answers();
  const double first = batch.logps[0] + batch.logps[1] + batch.logps[2];
  expect_loss_and_slopes(batch, presets::topr(), (-2 * first + 0.5 * 2 * batch.logps[3]) / 2,
                         {-1, -1, -1, 0.5, 0, 0});
}

}  // namespace
}  // namespace tether
