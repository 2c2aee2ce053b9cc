#include "rl/policy/grpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Means of the answers: -5.6 / 3 and 1.6; of both: -4 / 30.
TEST(Grpo, IsTheMeanOverAnswersOfTheirMeans) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::grpo(), -4.0 / 30, {-2.2 / 6, 0, -1.0 / 6, 0, 0, 0});
}

// d = log 2 at the lone token: k3 = 2 - 1 - log 2, by logp 1 - 2; half of the loss is its answer's.
TEST(Grpo, ThePenaltyIsAveragedAlike) {
  Batch<double> batch = two_answers();
  batch.ref_logps[3] = batch.logps[3] + std::log(2);
  expect_loss_and_slopes(batch, presets::grpo(0.5), -4.0 / 30 + 0.5 * (1 - std::log(2)) / 2,
                         {-2.2 / 6, 0, -1.0 / 6, -0.25, 0, 0});
}

TEST(Grpo, TakesItsBoundsFromTheCaller) {  // 1.5 to 1.4, 0.5 to 0.9
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::grpo(0, {.epsilon_low = 0.1, .epsilon_high = 0.4}),
                         (-6.0 / 3 + 1.8) / 2, {-2.2 / 6, 0, -1.0 / 6, 0, 0, 0});
}

}  // namespace
}  // namespace tether
