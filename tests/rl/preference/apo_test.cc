#include "rl/preference/apo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// beta = 1/2; e^u = 3 of the chosen, 1/3 of the rejected; e^x = 9.
TEST(Apo, MatchesByHand) {
  const double u = 2 * std::log(3);
  const auto zero = ApoZero{}(pair_at(u, -u, 0.5));
  EXPECT_DOUBLE_EQ(zero.value, 1.0 / 4 + 1.0 / 4);
  EXPECT_DOUBLE_EQ(zero.grad[0], 0.5 * -3.0 / 16);
  EXPECT_DOUBLE_EQ(zero.grad[1], 0.5 * +3.0 / 16);
  const auto down = ApoDown{}(pair_at(u, -u, 0.5));
  EXPECT_DOUBLE_EQ(down.value, 3.0 / 4 + 1.0 / 10);
  EXPECT_DOUBLE_EQ(down.grad[0], 0.5 * (3.0 / 16 - 9.0 / 100));
  EXPECT_DOUBLE_EQ(down.grad[1], 0.5 * 9.0 / 100);
}

// The anchor is the baseline: of apo_down it moves the chosen answer's own term alone.
TEST(Apo, TheAnchorIsTheBaseline) {
  auto pair = pair_at(4, 1, 1);
  pair.chosen.baseline = pair.rejected.baseline = {4};
  EXPECT_DOUBLE_EQ(ApoZero{}(pair).value, 0.5 + 1 / (1 + std::exp(3)));
  EXPECT_DOUBLE_EQ(ApoDown{}(pair).value, 0.5 + 1 / (1 + std::exp(3)));
}

}  // namespace
}  // namespace tether
