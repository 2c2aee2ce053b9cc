#include "rl/preference/discopop.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// tau = 1/2, beta = 1/2, e^x = 3, e^(x / tau) = 9: m = 0.9.
// 0.1 log(4/3) + 0.9 / 3; by x 2 0.9 0.1 (log(3/4) + 1/3) - 0.1 / 4 - 0.9 / 3.
TEST(DiscoPair, MatchesByHand) {
  const DiscoPair disco{.tau = 0.5};
  const auto loss = disco(pair_at(2 * std::log(3), 0, 0.5));
  EXPECT_DOUBLE_EQ(loss.value, 0.1 * std::log(4.0 / 3) + 0.3);
  const double slope = 0.18 * (std::log(0.75) + 1.0 / 3) - 0.025 - 0.3;
  EXPECT_NEAR(loss.grad[0], 0.5 * slope, 1e-16);
  EXPECT_NEAR(loss.grad[1], 0.5 * -slope, 1e-16);
}

// e^-x is infinite there, m is 0.
TEST(DiscoPair, IsTheLogisticLossOfPairsFarOnTheWrongSide) {
  const auto loss = DiscoPair{}(pair_at(-1e6, 0, 0.1));
  EXPECT_DOUBLE_EQ(loss.value, 1e5);
  EXPECT_DOUBLE_EQ(loss.grad[0], -0.1);
}

TEST(DiscoPair, MoreMarginCostsMoreFromZeroOn) {
  EXPECT_NEAR(DiscoPair{}(pair_at(0, 0, 1)).grad[0], 0.784, 1e-3);
}

}  // namespace
}  // namespace tether
