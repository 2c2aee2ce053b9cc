#include "rl/level.h"

#include <gtest/gtest.h>

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
}

}  // namespace
}  // namespace tether
