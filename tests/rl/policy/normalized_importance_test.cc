#include "rl/policy/normalized_importance.h"

#include <cmath>

#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;

auto near(double x) { return DoubleNear(x, 1e-15); }

TEST(NormalizedImportance, IsTheTruncatedRatioOverItsMean) {
  // Ratios 1, 4 and 1/2; truncated at 2 their mean is 3.5 / 3.
  BatchTokens tokens{.logp = {0, 0, 0},
                     .old_logp = {-1, -1, -1},
                     .rollout_logp = {-1, -1 - std::log(4), -1 + std::log(2)}};
  EXPECT_THAT(weights_by(NormalizedImportance{}, tokens),
              ElementsAre(near(6.0 / 7), near(12.0 / 7), near(3.0 / 7)));
  EXPECT_THAT(weights_by(NormalizedImportance{.low = 1, .high = 1}, tokens), ElementsAre(1, 1, 1));
  tokens.weight = {1, 0.5, 1};  // the mean is 2.5 / 2.5
  EXPECT_THAT(weights_by(NormalizedImportance{}, tokens), ElementsAre(near(1), near(2), near(0.5)));
}

TEST(NormalizedImportance, SaturatesAndHasAMeanOfOne) {
  const BatchTokens tokens{
      .logp = {0, 0, 0}, .old_logp = {-1000, -1, 0}, .rollout_logp = {0, -1, -1000}};
  EXPECT_THAT(weights_by(NormalizedImportance{.high = infinity}, tokens),
              ElementsAre(near(0), near(0), near(3)));
}

}  // namespace
}  // namespace tether
