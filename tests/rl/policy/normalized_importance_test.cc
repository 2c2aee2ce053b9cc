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

// Answers of two tokens and of one: products 2 and 1/2, of which the mean is 5/4; geometric means
// sqrt 2 and 1/2. By tokens the first would count twice.
TEST(NormalizedImportance, AnswersHaveOneWeightAndCountOnce) {
  BatchTokens tokens{.logp = {0, 0, 0},
                     .old_logp = {-1, -1, -1},
                     .rollout_logp = {-1 - std::log(4), -1 + std::log(2), -1 + std::log(2)},
                     .row_ends = {2, 3}};
  const NormalizedImportance product{.level = ImportanceLevel::sequence_sum};
  EXPECT_THAT(weights_by(product, tokens), ElementsAre(near(1.6), near(1.6), near(0.4)));
  const double root = std::sqrt(2), mean = (root + 0.5) / 2;
  const NormalizedImportance geometric{.level = ImportanceLevel::sequence_mean};
  EXPECT_THAT(weights_by(geometric, tokens),
              ElementsAre(near(root / mean), near(root / mean), near(0.5 / mean)));
  tokens.weight = {1, 0.5, 1};  // x = log 4 - log(2) / 2: 2^(3/2) is truncated at 2
  EXPECT_THAT(weights_by(product, tokens), ElementsAre(near(1.6), near(1.6), near(0.4)));
}

// Turns of two tokens and of one in an answer: as those answers above.
TEST(NormalizedImportance, TurnsHaveOneWeightAndCountOnce) {
  const BatchTokens tokens{
      .logp = {0, 0, 0, 0},
      .old_logp = {-1, -1, -1, -1},
      .rollout_logp = {-1 - std::log(4), -1 + std::log(2), -1 + std::log(2), -1 - std::log(1.25)},
      .row_ends = {3, 4},
      .turn_ends = {2, 3, 4}};
  const NormalizedImportance product{.level = ImportanceLevel::turn_sum};  // 2, 1/2 and 5/4
  EXPECT_THAT(weights_by(product, tokens), ElementsAre(near(1.6), near(1.6), near(0.4), near(1)));
  const double root = std::sqrt(2), mean = (root + 0.5 + 1.25) / 3;
  const NormalizedImportance geometric{.level = ImportanceLevel::turn_mean};
  EXPECT_THAT(weights_by(geometric, tokens), ElementsAre(near(root / mean), near(root / mean),
                                                         near(0.5 / mean), near(1.25 / mean)));
}

// Ratios 1, 4, 1/2 and 1/8 within [1/2, 2]: 1, 0, 1/2 and 0, of which the mean is 3/8; the bounds
// are within. At the level of answers 4 and 1/16 leave nothing.
TEST(NormalizedImportance, MasksRatiosBeyondItsBounds) {
  const BatchTokens tokens{.logp = {0, 0, 0, 0},
                           .old_logp = {0, 0, 0, 0},
                           .rollout_logp = {0, -std::log(4), -std::log(0.5), -std::log(0.125)},
                           .row_ends = {2, 4}};
  NormalizedImportance rule{.low = 0.5, .high = 2, .beyond = BeyondBounds::masked};
  EXPECT_THAT(weights_by(rule, tokens), ElementsAre(near(8.0 / 3), 0, near(4.0 / 3), 0));
  rule.level = ImportanceLevel::sequence_sum;
  EXPECT_THAT(weights_by(rule, tokens), ElementsAre(0, 0, 0, 0));
  rule.level = ImportanceLevel::sequence_mean;  // 2 and 1/4
  EXPECT_THAT(weights_by(rule, tokens), ElementsAre(near(2), near(2), 0, 0));
}

TEST(NormalizedImportance, LooksAtTurnsWhereItsLevelDoes) {
  EXPECT_FALSE(BatchWeight(NormalizedImportance{}).needs().turns);
  EXPECT_TRUE(BatchWeight(NormalizedImportance{.level = ImportanceLevel::turn_sum}).needs().turns);
}

TEST(NormalizedImportance, SaturatesAndHasAMeanOfOne) {
  const BatchTokens tokens{
      .logp = {0, 0, 0}, .old_logp = {-1000, -1, 0}, .rollout_logp = {0, -1, -1000}};
  EXPECT_THAT(weights_by(NormalizedImportance{.high = infinity}, tokens),
              ElementsAre(near(0), near(0), near(3)));
}

}  // namespace
}  // namespace tether
