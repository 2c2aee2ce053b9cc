#include "rl/policy/dr_grpo.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Sums of -5.6 and 1.6, over 2 answers and a budget of 8 tokens: -4 / 16.
TEST(DrGrpo, DividesSumsByTheAnswersAndAConstant) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::dr_grpo(8), -0.25, {-2.2 / 16, 0, -1.0 / 16, 0, 0, 0});
}

// The first token of the long answer and a lone token of the same ratio weigh the same.
TEST(DrGrpo, ATokensWeightDoesNotDependOnTheLengthOfItsAnswer) {
  Batch<double> batch = two_answers();
  batch.logps[3] = batch.logps[0];
  batch.advantages[3] = 2;
  batch.run(presets::dr_grpo(8));
  EXPECT_EQ(batch.dlogps[0], batch.dlogps[3]);
}

}  // namespace
}  // namespace tether
