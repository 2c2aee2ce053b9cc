#include "rl/preference/exo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// e^x = 3 and e = 1/4: q is what the label says, nothing is lost. At x = 0, q = 1/2:
// 1/2 log((1/2) / (3/4)) + 1/2 log((1/2) / (1/4)), by x 1/4 (0 - log 3).
TEST(ExoPair, MatchesByHand) {
  const ExoPair exo{.label_smoothing = 0.25};
  const auto best = exo(pair_at(2 * std::log(3), 0, 0.5));
  EXPECT_NEAR(best.value, 0, 1e-16);
  EXPECT_NEAR(best.grad[0], 0, 1e-16);
  const auto even = exo(pair_at(7, 7, 0.5));
  EXPECT_DOUBLE_EQ(even.value, std::log(2.0 / 3) / 2 + std::log(2) / 2);
  EXPECT_DOUBLE_EQ(even.grad[0], 0.5 * -std::log(3) / 4);
  EXPECT_DOUBLE_EQ(even.grad[1], 0.5 * +std::log(3) / 4);
}

// -log e or -log(1 - e), and no gradient.
TEST(ExoPair, LeavesAlonePairsThatRanAwayOnEitherSide) {
  const ExoPair exo{.label_smoothing = 0.001};
  const auto wrong = exo(pair_at(-1e6, 0, 1)), right = exo(pair_at(1e6, 0, 1));
  EXPECT_DOUBLE_EQ(wrong.value, -std::log(0.001));
  EXPECT_EQ(wrong.grad[0], 0);
  EXPECT_DOUBLE_EQ(right.value, -std::log1p(-0.001));
  EXPECT_EQ(right.grad[0], 0);
}

}  // namespace
}  // namespace tether
