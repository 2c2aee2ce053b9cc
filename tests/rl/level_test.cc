#include "rl/level.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "rl/policy/importance.h"
#include "rl/policy/ppo.h"
#include "rl/policy/rejection.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// What a surrogate sees, times A.
struct LogRatioTimesA {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.log_ratio * token.advantage;
  }
};
struct LogpTimesA {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.logp * token.advantage;
  }
};

// One row of weight n = 2.5: log-ratios u with mean 0.42 and sum 1.05, logps with mean -2 and sum
// -5, sum_t w_t A_t = 5.
Batch<double> row() {
  Batch<double> batch(1, 4);
  batch.mask = {1, 1, 0.5, 0};
  batch.logps = {-1, -2, -4, NAN};
  batch.old_logps = {-1.2, -2.4, -4.9, NAN};
  batch.advantages = {1, 2, 4, NAN};
  return batch;
}

void expect_level(const Surrogate& surrogate, RatioLevel level, double loss,
                  const std::vector<double>& slopes) {
  Batch<double> batch = row();
  const PolicyObjective objective{
      .level = level, .surrogate = surrogate, .aggregation = token_sum()};
  EXPECT_NEAR(batch.run(objective).loss, loss, 2e-15);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(batch.dlogps[i], slopes[i], 1e-15) << i;
}

// sum_t w_t A_t u_t = 0.2 + 0.8 + 1.8
TEST(RatioLevel, OfTokensIsTheirOwn) {
  expect_level(LogRatioTimesA{}, RatioLevel::token, 2.8, {1, 2, 2, 0});
  expect_level(LogpTimesA{}, RatioLevel::token, -13, {1, 2, 2, 0});
}

// 5 L, and d L / d logp_s = w_s / n.
TEST(RatioLevel, OfASequenceByMeanIsSharedWithItsGradient) {
  expect_level(LogRatioTimesA{}, RatioLevel::sequence_mean, 2.1, {2, 2, 1, 0});
  expect_level(LogpTimesA{}, RatioLevel::sequence_mean, -10, {2, 2, 1, 0});
}

// The value is the mean's, the gradient w_t A_t the token's own.
TEST(RatioLevel, OfASequenceByTokenSharesTheValueAlone) {
  expect_level(LogRatioTimesA{}, RatioLevel::sequence_token, 2.1, {1, 2, 2, 0});
  expect_level(LogpTimesA{}, RatioLevel::sequence_token, -13, {1, 2, 2, 0});
}

// 5 L, and d L / d logp_s = w_s.
TEST(RatioLevel, OfASequenceBySumIsSharedWithItsGradient) {
  expect_level(LogRatioTimesA{}, RatioLevel::sequence_sum, 5.25, {5, 5, 2.5, 0});
  expect_level(LogpTimesA{}, RatioLevel::sequence_sum, -25, {5, 5, 2.5, 0});
}

TEST(RatioLevel, IsSharedWhereOneNumberStandsForTheSequence) {
  EXPECT_FALSE(shares_ratio(RatioLevel::token));
  EXPECT_TRUE(shares_ratio(RatioLevel::sequence_mean));
  EXPECT_FALSE(shares_ratio(RatioLevel::sequence_token));
  EXPECT_TRUE(shares_ratio(RatioLevel::sequence_sum));
  EXPECT_TRUE(shares_ratio(RatioLevel::turn_mean));
  EXPECT_FALSE(shares_ratio(RatioLevel::turn_token));
  EXPECT_TRUE(shares_ratio(RatioLevel::turn_sum));
}

// A row of two turns, of weights 2 and 1: log-ratios with means 0.3 and 0.5 and sums 0.6 and 0.5,
// sum_t w_t A_t = 3 in each.
Batch<double> turns(const std::vector<int64_t>& ids) {
  Batch<double> batch(1, 5);
  batch.mask = {1, 1, 0, 0.5, 0.5};
  batch.logps = {-1, -2, NAN, -4, -3};
  batch.old_logps = {-1.2, -2.4, NAN, -4.9, -3.1};
  batch.advantages = {1, 2, NAN, 4, 2};
  batch.turn_ids = ids;
  return batch;
}

const std::vector<int64_t> kRunsOfTheMask = {};

void expect_turns(Batch<double> batch, RatioLevel level, double loss,
                  const std::vector<double>& slopes) {
  const PolicyObjective objective{
      .level = level, .surrogate = LogRatioTimesA{}, .aggregation = token_sum()};
  EXPECT_NEAR(batch.run(objective).loss, loss, 2e-15);
  for (size_t i = 0; i < slopes.size(); ++i) EXPECT_NEAR(batch.dlogps[i], slopes[i], 1e-15) << i;
}

TEST(RatioLevel, OfATurnIsTheSameOverItsTokens) {
  for (const auto& ids : {kRunsOfTheMask, {7, 7, -9, 8, 8}}) {
    expect_turns(turns(ids), RatioLevel::turn_mean, 2.4, {1.5, 1.5, 0, 1.5, 1.5});
    expect_turns(turns(ids), RatioLevel::turn_token, 2.4, {1, 2, 0, 2, 1});
    expect_turns(turns(ids), RatioLevel::turn_sum, 3.3, {3, 3, 0, 1.5, 1.5});
  }
}

TEST(RatioLevel, OfATurnIsTheSequencesWhereARowIsOneTurnAndTheTokensWhereEachIsOne) {
  const auto run = [](RatioLevel level, const std::vector<int64_t>& ids) {
    Batch<double> batch = random_batch<double>(4, 700);
    batch.turn_ids = ids;
    const PolicyTotals totals = batch.run({.level = level, .surrogate = PpoClip{}});
    return std::pair(totals.loss, batch.dlogps);
  };
  std::vector<int64_t> ones(4 * 700, 1), all(4 * 700);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  const auto expect_near = [](const auto& got, const auto& want) {
    EXPECT_NEAR(got.first / want.first, 1, 1e-13);
    for (size_t i = 0; i < want.second.size(); ++i) {
      EXPECT_NEAR(got.second[i], want.second[i], 1e-13 * (1 + std::abs(want.second[i]))) << i;
    }
  };
  expect_near(run(RatioLevel::turn_mean, ones), run(RatioLevel::sequence_mean, {}));
  expect_near(run(RatioLevel::turn_token, ones), run(RatioLevel::sequence_token, {}));
  expect_near(run(RatioLevel::turn_sum, ones), run(RatioLevel::sequence_sum, {}));
  for (const auto level : {RatioLevel::turn_mean, RatioLevel::turn_token, RatioLevel::turn_sum}) {
    expect_near(run(level, all), run(RatioLevel::token, {}));
  }
}

// By ids that ascend, by ids with anything in masked slots, by runs: the same turns, the same bits,
// over the borders of blocks too.
TEST(RatioLevel, OfATurnIsTheSameHoweverTurnsAreTold) {
  constexpr int64_t kColumns = 3 * kBlock;
  Batch<double> batch = random_batch<double>(2, kColumns);
  std::vector<int64_t> ascending, anything;
  int64_t turn = 0;
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    const bool masked = i % 100 == 70 || i % 300 == 255;
    batch.mask[i] = masked ? 0 : 1;
    turn += masked ? 1 : 0;
    ascending.push_back(turn);
    anything.push_back(masked ? -turn : turn);
  }
  for (const auto level : {RatioLevel::turn_mean, RatioLevel::turn_token, RatioLevel::turn_sum}) {
    const PolicyObjective objective{.level = level, .surrogate = LogRatioTimesA{}};
    batch.turn_ids = {};
    const PolicyTotals by_runs = batch.run(objective);
    const std::vector<double> gradient = batch.dlogps;
    EXPECT_EQ(by_runs.metrics.sums[2 * PolicyMetrics::kRatio + 1], turn + 2);  // in two rows
    for (const auto& ids : {ascending, anything}) {
      batch.turn_ids = ids;
      EXPECT_EQ(batch.run(objective).loss, by_runs.loss);
      EXPECT_EQ(batch.dlogps, gradient);
    }
  }
}

// A turn of which a weight takes the middle out is still one: u = 0.2, (1), 0.4.
TEST(RatioLevel, OfATurnDoesNotSplitWhereAWeightTakesATokenOut) {
  Batch<double> batch(1, 5);
  batch.mask = {0, 1, 1, 1, 0};
  batch.logps = {NAN, -1, -1, -2, NAN};
  batch.old_logps = {NAN, -1.2, -2, -2.4, NAN};
  batch.rollout_logps = {NAN, -1.2, -9, -2.4, NAN};
  batch.advantages = {NAN, 1, 100, 2, NAN};
  const PolicyObjective objective{.level = RatioLevel::turn_mean,
                                  .surrogate = LogRatioTimesA{},
                                  .weights = {{RatioGate{}, WeightLevel::token}},
                                  .aggregation = token_sum()};
  const PolicyTotals totals = batch.run(objective);
  EXPECT_NEAR(totals.loss, 0.9, 1e-15);
  EXPECT_EQ(totals.metrics.sums[2 * PolicyMetrics::kRatio + 1], 1);
}

TEST(RatioLevel, OfATurnIsCountedByTurns) {
  Batch<double> batch = turns({0, 0, 5, 1, 1});
  const PolicyObjective objective{.level = RatioLevel::turn_mean, .surrogate = LogRatioTimesA{}};
  const auto& sums = batch.run(objective).metrics.sums;
  EXPECT_EQ(sums[2 * PolicyMetrics::kRatio + 1], 2);
  EXPECT_EQ(sums[2 * PolicyMetrics::kPolicyLoss + 1], 3);
  EXPECT_NEAR(sums[2 * PolicyMetrics::kApproxKlK1], -0.8, 1e-15);
}

TEST(RatioLevel, OfATurnAsksForIdsThatDoNotDecrease) {
  Batch<double> batch = turns({4, 4, 9, 3, 3});
  const PolicyObjective objective{.level = RatioLevel::turn_mean, .surrogate = LogRatioTimesA{}};
  try {
    batch.run(objective);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "policy_loss: turn_ids must not decrease along a row, got 3 after 4 at [0, 3]");
  }
}

}  // namespace
}  // namespace tether
