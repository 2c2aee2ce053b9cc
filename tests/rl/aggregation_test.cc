#include "rl/aggregation.h"

#include <gtest/gtest.h>

#include "rl/policy/reinforce.h"
#include "tests/error_message.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// A step of 8 tokens in 2 sequences, a row of 5 tokens.
TEST(Aggregation, TheFactorOfARowByHand) {
  const TermCounts step{.tokens = 8, .sequences = 2};
  EXPECT_EQ(row_factor(token_mean(), step, 5), 1.0 / 8);
  EXPECT_EQ(row_factor(sequence_mean_token_mean(), step, 5), 1.0 / (2 * 5));
  EXPECT_EQ(row_factor(sequence_mean_token_sum(), step, 5), 1.0 / 2);
  EXPECT_EQ(row_factor(sequence_sum_over_constant(16), step, 5), 1.0 / (2 * 16));
  EXPECT_EQ(row_factor(token_sum(), step, 5), 1);
}

TEST(Aggregation, NothingToDivideByGivesAFactorOfZero) {
  EXPECT_EQ(row_factor(token_mean(), {}, 0), 0);
  EXPECT_EQ(row_factor(sequence_mean_token_mean(), {.tokens = 8, .sequences = 2}, 0), 0);
  EXPECT_EQ(row_factor(sequence_mean_token_sum(), {}, 0), 0);
  EXPECT_EQ(row_factor(sequence_sum_over_constant(16), {}, 0), 0);
}

TEST(Normalizer, WhatIsAbsentIsOfThisBatchAndThePenaltyFollowsTheSurrogate) {
  const TermCounts local{.tokens = 8, .sequences = 2};
  const StepCounts none = step_counts("f", {}, local, token_mean());
  EXPECT_EQ(none.policy.tokens, 8);
  EXPECT_EQ(none.kl.tokens, 8);
  EXPECT_EQ(none.policy.sequences, 2);
  const StepCounts some = step_counts("f", {.policy = 24, .sequences = 6}, local, token_mean());
  EXPECT_EQ(some.policy.tokens, 24);
  EXPECT_EQ(some.kl.tokens, 24);
  EXPECT_EQ(some.kl.sequences, 6);
  const StepCounts apart = step_counts("f", {.policy = 24, .kl = 32}, local, token_mean());
  EXPECT_EQ(apart.policy.tokens, 24);
  EXPECT_EQ(apart.kl.tokens, 32);
}

TEST(Normalizer, AStepOfNothingIsLegalWhereThisBatchHasNothing) {
  EXPECT_EQ(step_counts("f", {.policy = 0, .sequences = 0}, {}, token_mean()).policy.tokens, 0);
}

TEST(Normalizer, WithoutTheCountThatIsDividedByIsRefused) {
  const TermCounts local{.tokens = 8, .sequences = 2};
  const auto said = [&](const Aggregation& aggregation, const Normalizer& normalizer) {
    return message([&] { step_counts("f", normalizer, local, aggregation); });
  };
  EXPECT_EQ(said(token_mean(), {.sequences = 6}),
            "f: normalizer.policy must be given where other counts are, for token_mean, got none");
  EXPECT_EQ(said(token_mean(), {.kl = 6}), said(token_mean(), {.sequences = 6}));
  for (const Aggregation& each :
       {sequence_mean_token_mean(), sequence_mean_token_sum(), sequence_sum_over_constant(16)}) {
    const std::string name(kAggregationNames[static_cast<size_t>(each.mode)]);
    EXPECT_EQ(
        said(each, {.policy = 24}),
        "f: normalizer.sequences must be given where other counts are, for " + name + ", got none");
  }
  EXPECT_EQ(step_counts("f", {.policy = 24}, local, token_sum()).policy.sequences, 2);
  EXPECT_EQ(step_counts("f", {.world_size = 4}, local, token_mean()).policy.tokens, 8);
}

// S = -logp: terms 1, 2, 3 in one row, 4 with half a weight in another, none in the last.
//   sums 6 and 2, weights 3 and 1/2
TEST(Aggregation, OfARaggedBatchByHand) {
  Batch<double> batch(3, 3);
  batch.mask = {1, 1, 1, 0.5, 0, 0, 0, 0, 0};
  batch.logps = {-1, -2, -3, -4, NAN, NAN, NAN, NAN, NAN};
  for (double& each : batch.advantages) each = 1;
  PolicyObjective objective = presets::reinforce();
  const auto loss = [&](const Aggregation& aggregation, const Normalizer& normalizer = {}) {
    objective.aggregation = aggregation;
    return batch.run(objective, normalizer).loss;
  };
  EXPECT_DOUBLE_EQ(loss(token_mean()), 8 / 3.5);
  EXPECT_DOUBLE_EQ(loss(sequence_mean_token_mean()), (6.0 / 3 + 2 / 0.5) / 2);
  EXPECT_DOUBLE_EQ(loss(sequence_mean_token_sum()), 8.0 / 2);
  EXPECT_DOUBLE_EQ(loss(sequence_sum_over_constant(5)), 8.0 / 2 / 5);
  EXPECT_DOUBLE_EQ(loss(token_sum()), 8);
  EXPECT_DOUBLE_EQ(loss(token_mean(), {.policy = 16, .world_size = 4, .scale = 0.5}), 1);
  EXPECT_DOUBLE_EQ(batch.dlogps[3], -0.5 / 16 * 4 * 0.5);
}

}  // namespace
}  // namespace tether
