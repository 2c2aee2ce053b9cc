#include "rl/policy/turn_mean.h"

#include <gtest/gtest.h>

#include "rl/kernels/batch_weights.h"
#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::ElementsAre;

// Two answers: turns of 1 and 3 tokens, and one of 2.
BatchTokens turns() {
  return {.weight = {1, 1, 1, 1, 1, 1}, .row_ends = {4, 6}, .turn_ends = {1, 4, 6}};
}

TEST(TurnMean, MakesTheTurnsOfARowCountAlike) {
  EXPECT_THAT(weights_by(TurnMean{}, turns()), ElementsAre(2, 2.0 / 3, 2.0 / 3, 2.0 / 3, 1, 1));
}

TEST(TurnMean, OrThoseOfTheBatch) {
  BatchTokens more = turns();
  more.row_ends = {1, 6};  // the first turn is an answer of its own
  EXPECT_THAT(weights_by(TurnMean{.over = TurnsOf::batch}, more),
              ElementsAre(2, 2.0 / 3, 2.0 / 3, 2.0 / 3, 1, 1));
  EXPECT_THAT(weights_by(TurnMean{}, more), ElementsAre(1, 2.5 / 3, 2.5 / 3, 2.5 / 3, 1.25, 1.25));
}

TEST(TurnMean, CountsTokensByTheirWeight) {
  const BatchTokens tokens{.weight = {0.5, 1, 0.5}, .row_ends = {3}, .turn_ends = {1, 3}};
  EXPECT_THAT(weights_by(TurnMean{}, tokens), ElementsAre(2, 2.0 / 3, 2.0 / 3));
}

std::vector<double> weights_of(const std::vector<double>& mask, const std::vector<int64_t>& ids) {
  const auto size = static_cast<int64_t>(mask.size());
  std::vector<double> out(mask.size());
  const ConstArray rows{mask.data(), DType::float64, size, 1};
  BatchWeightArrays batch{
      .layout = {.rows = 1, .columns = size}, .logps = rows, .response_mask = rows};
  if (!ids.empty()) batch.turn_ids = {ids.data(), DType::int64, size, 1};
  batch_weights("f", batch, TurnMean{}, {out.data(), DType::float64, size, 1});
  return out;
}

TEST(TurnMean, FindsTurnsByIdsOrRunsOfTheMask) {
  const std::vector<double> mask{0, 1, 1, 0, 1, 0};
  EXPECT_THAT(weights_of(mask, {}), ElementsAre(1, 0.75, 0.75, 1, 1.5, 1));
  EXPECT_THAT(weights_of(mask, {9, 1, 1, 9, 1, 9}), ElementsAre(1, 1, 1, 1, 1, 1));
  EXPECT_THAT(weights_of(mask, {9, 1, 2, 9, 2, 9}), ElementsAre(1, 1.5, 0.75, 1, 0.75, 1));
}

}  // namespace
}  // namespace tether
