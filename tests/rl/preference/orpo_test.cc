#include "rl/preference/orpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/preference_batch.h"

namespace tether {
namespace {

// Two answers of two tokens each, chosen before rejected.
PairRows<double> batch_of(std::vector<double> logps) {
  PairRows<double> out(1, 2);
  out.mask.assign(4, 1);
  out.logps = std::move(logps);
  return out;
}

// Mean log-probabilities of log(1/2) and log(1/4): odds of 1 and 1/3, so that sigmoid(x) = 3/4. By
// the mean of the chosen answer x has the slope 1 / (1 - 1/2), by that of the other 1 / (1 - 1/4).
TEST(Orpo, IsTheLossOfThePaperByHand) {
  const double half = -std::log(2), quarter = -std::log(4);
  PairRows<double> batch = batch_of({1.5 * half, 0.5 * half, quarter, quarter});
  EXPECT_DOUBLE_EQ(batch.run(presets::orpo(0.2)).loss, -half + 0.2 * std::log(4.0 / 3));
  for (size_t t = 0; t < 2; ++t) {
    EXPECT_DOUBLE_EQ(batch.dlogps[t], (-1 - 0.2 * 0.25 * 2) / 2);
    EXPECT_DOUBLE_EQ(batch.dlogps[2 + t], 0.2 * 0.25 * 4 / 3 / 2);
  }
}

TEST(Orpo, TheNllMayTakeThePromptToo) {
  PairRows<double> batch = batch_of({-3, -1, -2, -2});
  batch.mask[0] = 0;
  batch.nll_mask = {1, 1, 1, 1};
  const auto metrics = batch.run(presets::orpo()).metrics.to_map();
  EXPECT_EQ(metrics.at("nll"), 2);
  EXPECT_EQ(metrics.at("logp_chosen"), -1);
  EXPECT_EQ(batch.dlogps[0], -0.5);
}

TEST(Orpo, ACertainAnswerGivesNoNaN) {
  for (const std::vector<double>& logps : {std::vector<double>{0, 0, -1, -1}, {-1, -1, 0, 0}}) {
    PairRows<double> batch = batch_of(logps);
    EXPECT_TRUE(std::isfinite(batch.run(presets::orpo()).loss));
    for (const double slope : batch.dlogps) EXPECT_TRUE(std::isfinite(slope));
  }
}

TEST(Orpo, AnInfiniteTokenOfThePromptIsNaNAndCounted) {
  PairRows<double> batch = batch_of({-INFINITY, -1, -2, -2});
  batch.mask[0] = 0;
  batch.nll_mask = {1, 1, 1, 1};
  const PreferenceTotals out = batch.run(presets::orpo());
  EXPECT_TRUE(std::isnan(out.loss));
  EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 1);
}

}  // namespace
}  // namespace tether
