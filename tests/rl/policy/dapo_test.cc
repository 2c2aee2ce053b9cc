#include "rl/policy/dapo.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Clip-higher: the good token of ratio 1.5 ends at 1.28, the bad one of 0.5 at 0.8.
//   (-2.2 - 2.56 - 1.0 + 1.6) / 4
TEST(Dapo, IsTheTokenMeanWithAHigherBoundForGoodTokens) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::dapo(), -1.04, {-0.55, 0, -0.25, 0, 0, 0});
}

TEST(Dapo, AGoodTokenBetweenTheOldBoundAndTheHigherOneStillLearns) {
  Batch<double> batch = two_answers();
  batch.logps[1] = -1 + std::log(1.25);
  expect_loss_and_slopes(batch, presets::dapo(), (-2.2 - 2.5 - 1.0 + 1.6) / 4,
                         {-0.55, -0.625, -0.25, 0, 0, 0});
}

}  // namespace
}  // namespace tether
