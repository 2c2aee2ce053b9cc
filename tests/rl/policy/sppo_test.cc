#include "rl/policy/sppo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// One answer of two tokens, u = 0.5 and 1: U = 1.5.
Batch<double> answer() {
  Batch<double> out(1, 2);
  out.mask = {1, 1};
  out.logps = {-1, -0.5};
  out.old_logps = {-1.5, -1.5};
  out.advantages = {0.25, 0.25};
  return out;
}

TEST(Sppo, IsTheSquareOfLogRatioLessAdvantage) {
  Batch<double> batch = answer();
  expect_loss_and_slopes(batch, presets::sppo(2), 1, {2, 2});
}

TEST(Sppo, A2poScalesTheLogRatio) {
  Batch<double> batch = answer();
  expect_loss_and_slopes(batch, presets::a2po(0.5), 0.25, {0.5, 0.5});
}

TEST(Sppo, PullsDownWhatIsTooLikelyHoweverGood) {
  EXPECT_GT(SquaredRegression{}(token_at(std::exp(2), 1)).grad, 0);
  EXPECT_LT(SquaredRegression{}(token_at(std::exp(0.5), 1)).grad, 0);
}

}  // namespace
}  // namespace tether
