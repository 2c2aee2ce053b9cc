#include "rl/policy/bnpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// (-2.2 - 2.4 - 1.0 + 1.6) / 4: a token of the long answer weighs as much as that of the short one.
TEST(Bnpo, IsTheMeanOverTheTokensOfTheBatch) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::bnpo(), -1, {-0.55, 0, -0.25, 0, 0, 0});
}

// d = log 2 at the last token: k3 = 2 - 1 - log 2, by logp 1 - 2; each over the four tokens.
TEST(Bnpo, ThePenaltyIsAveragedAlike) {
  Batch<double> batch = two_answers();
  batch.ref_logps[3] = batch.logps[3] + std::log(2);
  expect_loss_and_slopes(batch, presets::bnpo(0.5), -1 + 0.5 * (1 - std::log(2)) / 4,
                         {-0.55, 0, -0.25, -0.125, 0, 0});
}

TEST(Bnpo, TakesItsBoundsFromTheCaller) {  // 1.5 to 1.4, 0.5 to 0.9
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::bnpo(0, {.epsilon_low = 0.1, .epsilon_high = 0.4}),
                         (-2.2 - 2.8 - 1.0 + 1.8) / 4, {-0.55, 0, -0.25, 0, 0, 0});
}

}  // namespace
}  // namespace tether
