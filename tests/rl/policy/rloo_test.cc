#include "rl/policy/rloo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

Batch<double> answers(const std::vector<double>& ratios, double A) {
  Batch<double> batch(2, 3);
  batch.mask = {1, 1, 1, 1, 0, 0};
  for (size_t i = 0; i < 4; ++i) batch.logps[i] = std::log(ratios[i]);
  batch.advantages.assign(6, A);
  return batch;
}

// r = 2 * 0.5 * 1.1 and 1.5, A = 2: losses -2.2 and -2.6. d r / d logp_t = r for every token.
TEST(Rloo, ClipsTheProductOfAnAnswersRatios) {
  Batch<double> batch = answers({2, 0.5, 1.1, 1.5}, 2);
  expect_loss_and_slopes(batch, presets::rloo({.epsilon_low = 0.2, .epsilon_high = 0.3}), -2.4,
                         {-1.1, -1.1, -1.1, 0, 0, 0});
}

// r = 1.5 and 0.5, A = -2: 3 is kept, 1.6 is clipped.
TEST(Rloo, ABadAnswerThatBecameTooLikelyIsPulledBack) {
  Batch<double> batch = answers({2, 0.5, 1.5, 0.5}, -2);
  expect_loss_and_slopes(batch, presets::rloo(), 2.3, {1.5, 1.5, 1.5, 0, 0, 0});
}

// The gradient of -A sum_t logp_t, averaged over 2 answers.
TEST(Rloo, OnPolicyItsGradientIsReinforces) {
  Batch<double> batch = answers({1, 1, 1, 1}, 3);
  expect_loss_and_slopes(batch, presets::rloo(), -3, {-1.5, -1.5, -1.5, -1.5, 0, 0});
}

}  // namespace
}  // namespace tether
