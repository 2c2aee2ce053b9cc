#include "rl/policy/covariance.h"

#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::ElementsAre;

// Means of 0: C is 3, -3, 4, -1, 0, 1.
BatchTokens tokens() {
  return {.logp = {1, -1, 2, -1, 0, -1},
          .old_logp = {1, -1, 2, -1, 0, -1},
          .advantage = {3, 3, 2, 1, -8, -1}};
}

TEST(Covariance, IsThatOfLogProbabilityAndAdvantage) {
  BatchTokens batch = tokens();
  batch.weight.assign(6, 1);
  EXPECT_THAT(covariances(batch), ElementsAre(3, -3, 4, -1, 0, 1));
  // A token of weight 1/2 counts half in both means: logp 2/5, advantage 0.
  batch = {.weight = {1, 1, 0.5}, .logp = {0, 0, 2}, .advantage = {1, -1, 0}};
  EXPECT_THAT(covariances(batch), ElementsAre(-0.4, 0.4, 0));
  batch = {.weight = {1, 1}, .logp = {-1, -3}, .advantage = {5, 1}};  // means -2 and 3
  EXPECT_THAT(covariances(batch), ElementsAre(2, 2));
}

TEST(KlCovPicks, AreTheShareOfHighestCovariance) {
  EXPECT_THAT(weights_by(KlCovPicks{.share = 0.5}, tokens()), ElementsAre(1, 0, 1, 0, 0, 1));
  EXPECT_THAT(weights_by(KlCovPicks{.share = 0.34}, tokens()), ElementsAre(1, 0, 1, 0, 0, 0));
  EXPECT_THAT(weights_by(KlCovPicks{}, tokens()), ElementsAre(0, 0, 1, 0, 0, 0));  // at least one
  EXPECT_THAT(weights_by(KlCovPicks{.share = 1}, tokens()), ElementsAre(1, 1, 1, 1, 1, 1));
}

TEST(ClipCovPicks, AreBetweenTheBoundsAndNotClippedAnyway) {
  const ClipCovPicks all{.share = 1, .low = 0.5, .high = 3.5};
  EXPECT_THAT(weights_by(all, tokens()), ElementsAre(0, 1, 1, 1, 1, 0));
  BatchTokens moved = tokens();
  moved.old_logp = {0.5, -1, 2, -1, 0, -0.5};  // ratios e^0.5 where A > 0, e^-0.5 where A < 0
  EXPECT_THAT(weights_by(all, moved), ElementsAre(1, 1, 1, 1, 1, 1));
  moved.old_logp = {1.5, -1, 2, -1, 0, -1.5};  // the other way round nothing is clipped
  EXPECT_THAT(weights_by(all, moved), ElementsAre(0, 1, 1, 1, 1, 0));
}

// C is 2 at ten tokens, -2 at five and 6 at five: two of the ten, each as often as the others.
TEST(ClipCovPicks, AreDrawnEvenly) {
  BatchTokens batch{.logp = std::vector<double>(20, 1), .advantage = std::vector<double>(20, 2)};
  for (size_t i = 10; i < 20; ++i) batch.advantage[i] = -2;
  for (size_t i = 15; i < 20; ++i) batch.logp[i] = -3;
  batch.old_logp = batch.logp;
  std::vector<int> picked(20, 0);
  for (int seed = 0; seed < 2000; ++seed) {
    const ClipCovPicks rule{.share = 0.1, .low = 1, .high = 4, .seed = double(seed)};
    const std::vector<double> weights = weights_by(rule, batch);
    int zeros = 0;
    for (size_t i = 0; i < 20; ++i) {
      picked[i] += weights[i] == 0;
      zeros += weights[i] == 0;
    }
    EXPECT_EQ(zeros, 2);
  }
  for (size_t i = 0; i < 10; ++i) EXPECT_NEAR(picked[i], 400, 90) << i;  // 5 standard deviations
  for (size_t i = 10; i < 20; ++i) EXPECT_EQ(picked[i], 0);
}

}  // namespace
}  // namespace tether
