#include "rl/preference/bco.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// beta = 1/2; e^u = 3 of both: sigmoid 3/4.
TEST(BcoPair, MatchesByHand) {
  const auto loss = BcoPair{}(pair_at(2 * std::log(3), 2 * std::log(3), 0.5));
  EXPECT_DOUBLE_EQ(loss.value, -std::log(3.0 / 4) - std::log(1.0 / 4));
  EXPECT_DOUBLE_EQ(loss.grad[0], 0.5 * -0.25);
  EXPECT_DOUBLE_EQ(loss.grad[1], 0.5 * 0.75);
}

// The reward shift delta, of both answers.
TEST(BcoPair, RewardsAreAboveTheBaseline) {
  auto pair = pair_at(5, 5, 1);
  pair.chosen.baseline = pair.rejected.baseline = {5};
  EXPECT_DOUBLE_EQ(BcoPair{}(pair).value, 2 * std::log(2));
}

}  // namespace
}  // namespace tether
