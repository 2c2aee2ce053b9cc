#include "rl/policy/decoupled_ppo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Losses and slopes of the tokens from token_at.h, weighed by e^0.1, 1, e^-0.2 and e^3.
TEST(DecoupledPpo, WeighsTheClippedSurrogate) {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1.1, -1, -0.8, -4, 0, 0};
  const double a = std::exp(0.1), c = std::exp(-0.2), d = std::exp(3);
  expect_loss_and_slopes(batch, presets::decoupled_ppo(), (-2.2 * a - 2.4 - 1.0 * c + 1.6 * d) / 4,
                         {-2.2 * a / 4, 0, -1.0 * c / 4, 0, 0, 0});
}

}  // namespace
}  // namespace tether
