#include "rl/policy/rec.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Ratios of 1.1, 1.5 and 0.5 with A = 2, of 0.5 with A = -2.
TEST(Rec, OneSideKeepsWhatPpoKeeps) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::rec_one_side(), -2 * (batch.logps[0] + batch.logps[2]) / 4,
                         {-0.5, 0, -0.5, 0, 0, 0});
}

TEST(Rec, TwoSideKeepsWhatIsNear) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::rec_two_side(), -2 * batch.logps[0] / 4,
                         {-0.5, 0, 0, 0, 0, 0});
}

TEST(Rec, RingKeepsWhatIsFarOnTheWrongSide) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::rec_ring(), -2 * (batch.logps[0] + batch.logps[2]) / 4,
                         {-0.5, 0, -0.5, 0, 0, 0});
  expect_loss_and_slopes(batch, presets::rec_ring({.far_low = 0.6}), -2 * batch.logps[0] / 4,
                         {-0.5, 0, 0, 0, 0, 0});
}

}  // namespace
}  // namespace tether
