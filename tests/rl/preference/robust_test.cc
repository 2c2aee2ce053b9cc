#include "rl/preference/robust.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// e^x = 3, e = 1/4: e / (1 - 2 e) = 1/2. -log(3/4) - log(3) / 2, by x -1/4 - 1/2.
TEST(RobustPair, MatchesBothOrdersByHand) {
  const RobustPair robust{.label_smoothing = 0.25};
  const auto right = robust(pair_at(2 * std::log(3) - 1, -1, 0.5));
  EXPECT_DOUBLE_EQ(right.value, std::log(4.0 / 3) - std::log(3) / 2);
  EXPECT_DOUBLE_EQ(right.grad[0], 0.5 * -0.75);
  EXPECT_DOUBLE_EQ(right.grad[1], 0.5 * +0.75);
  const auto wrong = robust(pair_at(-1, 2 * std::log(3) - 1, 0.5));
  EXPECT_DOUBLE_EQ(wrong.value, std::log(4) + std::log(3) / 2);
  EXPECT_DOUBLE_EQ(wrong.grad[0], 0.5 * -1.25);
}

// The mean over labels that are flipped with chance e is the loss of the right ones.
TEST(RobustPair, IsUnbiasedUnderFlippedLabels) {
  for (const double x : {-3.0, 0.5, 20.0}) {
    const RobustPair robust{.label_smoothing = 0.2};
    const double right = robust(pair_at(x, 0, 1)).value, flipped = robust(pair_at(0, x, 1)).value;
    EXPECT_NEAR(0.8 * right + 0.2 * flipped, std::log1p(std::exp(-x)), 1e-14) << x;
  }
}

}  // namespace
}  // namespace tether
