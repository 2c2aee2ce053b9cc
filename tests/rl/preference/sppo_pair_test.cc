#include "rl/preference/sppo_pair.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference/pair_at.h"

namespace tether {
namespace {

// beta = 1/4: targets of 2 and -2. Off by 1 and -3.
TEST(SquareAnswers, PullsBothAnswersToTheirTargets) {
  const auto loss = SquareAnswers{}(pair_at(3, -5, 0.25));
  EXPECT_EQ(loss.value, 1 + 9);
  EXPECT_EQ(loss.grad[0], 2);
  EXPECT_EQ(loss.grad[1], -6);
  EXPECT_EQ(SquareAnswers{}(pair_at(2, -2, 0.25)).value, 0);
}

}  // namespace
}  // namespace tether
