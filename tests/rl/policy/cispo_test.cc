#include "rl/policy/cispo.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// -clip(ratio) A logp at logp = -0.5, by logp -clip(ratio) A: no token loses its gradient.
TEST(IsReinforce, EveryTokenKeepsItsGradientAtAClippedWeight) {
  const IsReinforce weight{.ratio_low = 0.8, .ratio_high = 1.3};
  struct Row {
    double ratio, advantage, value, grad;
  };
  for (const Row& row : {Row{1.1, +2, +1.1, -2.2}, Row{1.1, -2, -1.1, +2.2},   // inside
                         Row{1.5, +2, +1.3, -2.6}, Row{1.5, -2, -1.3, +2.6},   // above
                         Row{0.5, +2, +0.8, -1.6}, Row{0.5, -2, -0.8, +1.6}})  // below
  {
    const auto loss = weight(token_at(row.ratio, row.advantage, -0.5));
    EXPECT_DOUBLE_EQ(loss.value, row.value) << "ratio " << row.ratio << ", A " << row.advantage;
    EXPECT_DOUBLE_EQ(loss.grad, row.grad) << "ratio " << row.ratio << ", A " << row.advantage;
  }
}

TEST(IsReinforce, ByDefaultOnlyLargeRatiosAreTruncated) {
  EXPECT_DOUBLE_EQ(IsReinforce{}(token_at(7, 1)).grad, -5);
  EXPECT_DOUBLE_EQ(IsReinforce{}(token_at(1e-3, 1)).grad, -1e-3);
}

TEST(IsReinforce, SaysWhichRatiosItTakesAsTheyAre) {
  const RatioInterval kept = IsReinforce{.ratio_low = 0.8, .ratio_high = 1.3}.truncation();
  EXPECT_EQ(kept.low, 0.8);
  EXPECT_EQ(kept.high, 1.3);
}

// Weights 1.1, 1.2, 0.8 and 0.8, logp = -1 + log ratio, over four tokens.
TEST(Cispo, IsTheMeanOverTheTokensOfTheBatch) {
  Batch<double> batch = two_answers();
  const auto& logps = batch.logps;
  const double sum = -2.2 * logps[0] - 2.4 * logps[1] - 1.6 * logps[2] + 1.6 * logps[3];
  expect_loss_and_slopes(batch, presets::cispo({.ratio_low = 0.8, .ratio_high = 1.2}), sum / 4,
                         {-0.55, -0.6, -0.4, +0.4, 0, 0});
}

}  // namespace
}  // namespace tether
