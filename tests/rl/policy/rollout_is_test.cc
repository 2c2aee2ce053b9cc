#include "rl/policy/rollout_is.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(RolloutIs, WeighsReinforceWithinTheBounds) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::rollout_is({.low = 0.6, .high = 1.4}),
                         -1.1 * 2 * batch.logps[0] / 4, {-1.1 * 2 / 4, 0, 0, 0, 0, 0});
}

}  // namespace
}  // namespace tether
