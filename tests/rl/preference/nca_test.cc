#include "rl/preference/nca.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// beta = 1/2; e^u = 2 of the chosen, 3 of the rejected: sigmoids of 2/3 and 3/4.
TEST(NcaPair, MatchesByHand) {
  const auto loss = NcaPair{}(pair_at(2 * std::log(2), 2 * std::log(3), 0.5));
  EXPECT_DOUBLE_EQ(loss.value, -std::log(2.0 / 3) - std::log(1.0 / 3) / 2 - std::log(1.0 / 4) / 2);
  EXPECT_NEAR(loss.grad[0], 0, 1e-16);  // least there
  EXPECT_DOUBLE_EQ(loss.grad[1], 0.5 * 0.75 / 2);
}

TEST(NcaPair, PullsEachAnswerByItself) {
  const auto low = NcaPair{}(pair_at(-1e6, -1e6, 1)), high = NcaPair{}(pair_at(1e6, 1e6, 1));
  EXPECT_DOUBLE_EQ(low.grad[0], -1);
  EXPECT_EQ(low.grad[1], 0);
  EXPECT_DOUBLE_EQ(high.grad[0], 0.5);
  EXPECT_DOUBLE_EQ(high.grad[1], 0.5);
}

}  // namespace
}  // namespace tether
