#include "rl/policy/second_moment.h"

#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::ElementsAre;

TEST(SecondMoment, TakesTheLargestUntilTheMeanIsBelow) {
  // x^2 is 0.25, 1, 0, 0.0625: means from the small end 0, 0.03125, 0.1041.., 0.328125.
  const BatchTokens tokens{
      .logp = {0, 0, 0, 0}, .old_logp = {-1, -1, -1, -1}, .rollout_logp = {-1.5, 0, -1, -0.75}};
  EXPECT_THAT(weights_by(SecondMoment{}, tokens), ElementsAre(0, 0, 1, 1));
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.03125}, tokens), ElementsAre(0, 0, 1, 0));
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.125}, tokens), ElementsAre(1, 0, 1, 1));
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.5}, tokens), ElementsAre(1, 1, 1, 1));
}

TEST(SecondMoment, LeavesOneToken) {
  const BatchTokens tokens{.logp = {0, 0}, .old_logp = {-1, -1}, .rollout_logp = {-3, -2}};
  EXPECT_THAT(weights_by(SecondMoment{}, tokens), ElementsAre(0, 1));
}

TEST(SecondMoment, CountsTokensByTheirWeight) {
  // (0.1 x 1 + 1 x 0) / 1.1 is below 0.125, (1 + 0) / 2 is not.
  BatchTokens tokens{.weight = {0.1, 1}, .old_logp = {-1, -1}, .rollout_logp = {0, -1}};
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.125}, tokens), ElementsAre(1, 1));
  tokens.weight = {1, 0.1};  // 1 / 1.1 is not below 0.75
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.75}, tokens), ElementsAre(0, 1));
  tokens.weight = {1, 1};
  EXPECT_THAT(weights_by(SecondMoment{.threshold = 0.125}, tokens), ElementsAre(0, 1));
}

}  // namespace
}  // namespace tether
