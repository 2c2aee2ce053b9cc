#include "estimators/advantage/opo.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "estimators/advantage/groups.h"

namespace tether {
namespace {

using testing::ElementsAre;

TEST(Opo, TheBaselineIsTheMeanOfTheTokens) {
  // 1 x 1 + 3 x 0 over 4 tokens: 1/4. A group of one: 0. 2 x 4 + 6 x 8 over 8 tokens: 7.
  const double rewards[] = {1, 0, 5, 4, 8, 7}, lengths[] = {1, 3, 9, 2, 6, 0};
  const int64_t ids[] = {1, 1, 2, 3, 3, 3};
  double out[6];
  advantages_of_groups("advantage",
                       {.rewards = rewards, .group_ids = ids, .lengths = lengths, .count = 6},
                       Opo{}, out);
  EXPECT_THAT(out, ElementsAre(0.75, -0.25, 0, -3, 1, 0));
}

TEST(Opo, AGroupWithoutTokensHasTheMeanOfItsAnswers) {
  const double rewards[] = {3, 5, std::numeric_limits<double>::quiet_NaN()}, none[] = {0, 0, 7};
  double out[3];
  advantages_of_groups("advantage",
                       {.rewards = rewards, .lengths = none, .group_size = 3, .count = 3},
                       Opo{.nan_reward = NanReward::missing}, out);
  EXPECT_THAT(out, ElementsAre(-1, 1, 0));
}

}  // namespace
}  // namespace tether
