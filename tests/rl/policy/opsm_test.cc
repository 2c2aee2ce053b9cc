#include "rl/policy/opsm.h"

#include <gtest/gtest.h>

#include "rl/policy/reinforce.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// The mean of old_logp - logp is -log(0.825) / 3 in the first answer and log 2 in the second.
TEST(OffPolicyMask, StopsBadAnswersThatThePolicyLeft) {
  Batch<double> batch = two_answers();
  PolicyObjective objective = presets::reinforce();
  objective.weights = {{OffPolicyMask{}}};
  EXPECT_EQ(objective.weights[0].level, WeightLevel::sequence_mean);
  const double first = batch.logps[0] + batch.logps[1] + batch.logps[2];
  expect_loss_and_slopes(batch, objective, -2 * first / 4, {-0.5, -0.5, -0.5, 0, 0, 0});
  objective.weights = {{OffPolicyMask{.high = 0.7}}};
  expect_loss_and_slopes(batch, objective, (-2 * first + 2 * batch.logps[3]) / 4,
                         {-0.5, -0.5, -0.5, 0.5, 0, 0});
}

TEST(OffPolicyMask, LeavesGoodAnswersHoweverFar) {
  const WeightToken<Constant<double>> good{{-9}, {-1}, {0}, {0}, {1}};
  EXPECT_EQ(OffPolicyMask{}(good, OffPolicyMask{}.measure(good)).value, 1);
}

}  // namespace
}  // namespace tether
