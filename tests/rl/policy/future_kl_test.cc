#include "rl/policy/future_kl.h"

#include <cmath>

#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;

auto near(double x) { return DoubleNear(x, 1e-15); }

// u is 0.1, -0.2, 0.4 in one answer, 0.3 in the next.
BatchTokens moved() {
  return {.logp = {-0.9, -1.2, -0.6, -0.7},
          .old_logp = {-1, -1, -1, -1},
          .advantage = {1, 1, 1, 1},
          .row_ends = {3, 4}};
}

TEST(FutureKl, IsTheDecayedSumOfTheRestOfTheAnswer) {
  const FutureKl wide{.gamma = 0.5, .low = 0, .high = infinity};
  // F of the last is its own; then -0.2 + 0.2 and 0.1 + 0.
  EXPECT_THAT(weights_by(wide, moved()),
              ElementsAre(near(std::exp(0.1)), near(1), near(std::exp(0.4)), near(std::exp(0.3))));
  EXPECT_THAT(weights_by(FutureKl{.gamma = 0.5}, moved()),
              ElementsAre(near(std::exp(0.1)), near(1), 1.2, 1.2));
  EXPECT_THAT(weights_by(FutureKl{.gamma = 0, .low = 0.9, .high = 2}, moved()),
              ElementsAre(near(std::exp(0.1)), 0.9, near(std::exp(0.4)), near(std::exp(0.3))));
  EXPECT_NEAR(FutureKl{}.gamma, std::pow(2, -1.0 / 32), 1e-16);
}

TEST(FutureKl, LeavesHighRatiosOutOfTheSum) {
  const FutureKl rule{.gamma = 0.5, .low = 0, .high = infinity, .ratio_high = 1.4};  // e^0.4 = 1.49
  EXPECT_THAT(weights_by(rule, moved()),
              ElementsAre(near(1), near(std::exp(-0.2)), near(1), near(std::exp(0.3))));
}

TEST(FutureKl, DoesNotAmplifyABadTokenThatRanAway) {
  BatchTokens tokens{.logp = {0, 0, 0},
                     .old_logp = {-1.5, -1.5, -1.3},  // ratios 4.5, 4.5, 3.7
                     .advantage = {-1, 1, -1},
                     .row_ends = {1, 2, 3}};
  EXPECT_THAT(weights_by(FutureKl{}, tokens), ElementsAre(1, 1.2, 1.2));
  tokens.row_ends = {3};
  EXPECT_THAT(weights_by(FutureKl{.low = 0, .high = 0.5}, tokens), ElementsAre(0.8, 0.5, 0.5));
}

}  // namespace
}  // namespace tether
