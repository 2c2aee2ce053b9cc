#include "rl/policy_metrics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/cispo.h"
#include "rl/policy/gspo.h"
#include "rl/policy/ppo.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// The ratios of two rows of tokens.
Batch<double> batch_of_ratios(int64_t columns, const std::vector<double>& ratios,
                              const std::vector<double>& advantages,
                              const std::vector<double>& mask) {
  Batch<double> batch(static_cast<int64_t>(ratios.size()) / columns, columns);
  for (size_t i = 0; i < ratios.size(); ++i) batch.logps[i] = std::log(ratios[i]);
  batch.advantages = advantages;
  batch.mask = mask;
  return batch;
}

// CISPO keeps the gradient of every token; those whose weight is truncated are its clipped ones.
TEST(PolicyMetrics, TruncatedTokensOfCispoAreClipped) {
  // Not as lists of eight: GCC 12 takes two that begin alike for one under AVX-512.
  Batch<double> batch = batch_of_ratios(4, {1.5, 1.5, 0.5, 1.1, 0.5, 1.5, 1, 9},
                                        std::vector<double>(8, 1), std::vector<double>(8, 1));
  batch.advantages[1] = batch.advantages[2] = -1;
  batch.mask[7] = 0;
  const auto metrics =
      batch.run(presets::cispo({.ratio_low = 0.8, .ratio_high = 1.2})).metrics.to_map();
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_high"), 2 / 7.0);
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_dual"), 1 / 7.0);
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_low"), 2 / 7.0);  // of either sign
  const auto wide = batch.run(presets::cispo({.ratio_high = infinity})).metrics.to_map();
  EXPECT_EQ(wide.at("clip_fraction_high"), 0);
}

// One token of four has run away, far beyond where the square of its ratio is a float.
TEST(PolicyMetrics, TheEffectiveSampleSizeSurvivesARunawayToken) {
  for (const float log_ratio : {40.0f, 50.0f, 70.0f}) {
    Batch<float> batch(1, 4);
    batch.old_logps[0] = -log_ratio;
    batch.mask = {1, 1, 1, 1};
    EXPECT_NEAR(batch.run(presets::ppo()).metrics.to_map().at("ess"), 0.25, 1e-6) << log_ratio;
  }
}

// Ratios whose squares are no numbers any more: at least sum w / (n max w).
TEST(PolicyMetrics, TheEffectiveSampleSizeOfTinyRatiosIsNotNothing) {
  Batch<double> batch(1, 2);
  batch.logps = {-401, -402};
  batch.old_logps = {0, 0};
  batch.mask = {1, 1};
  EXPECT_NEAR(batch.run(presets::ppo()).metrics.to_map().at("ess"), (1 + std::exp(-1)) / 2, 1e-12);
  Batch<float> equal(1, 2);
  equal.logps = equal.old_logps = {-1, -1};
  for (float& each : equal.logps) each -= 58;
  equal.mask = {1, 1};
  EXPECT_NEAR(equal.run(presets::ppo()).metrics.to_map().at("ess"), 1, 1e-6);
}

// Sequences of 3, 1 and 0 tokens with ratios 2 and 1/2: every figure of a ratio counts the
// sequence, not its tokens.
TEST(PolicyMetrics, RatiosOfSequencesAreCountedBySequences) {
  for (const bool token_gradient : {false, true}) {
    Batch<double> batch = batch_of_ratios(3, {2, 2, 2, 0.5, 7, 7, 7, 7, 7},
                                          {1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 0, 0, 0, 0, 0});
    const PolicyTotals out = batch.run(token_gradient ? presets::gspo_token() : presets::gspo());
    const auto metrics = out.metrics.to_map();
    const double log2 = std::log(2.0);
    EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_high"), 0.5);
    EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_low"), 0);
    EXPECT_DOUBLE_EQ(metrics.at("ratio_mean"), 1.25);
    EXPECT_DOUBLE_EQ(metrics.at("ratio_squared_mean"), (4 + 0.25) / 2);
    EXPECT_DOUBLE_EQ(metrics.at("ess"), 1.25 * 1.25 / 2.125);
    EXPECT_NEAR(metrics.at("approx_kl_k1"), 0, 1e-15);
    EXPECT_NEAR(metrics.at("approx_kl_k3"), ((1 - log2) + (-0.5 + log2)) / 2, 1e-15);
    EXPECT_EQ(metrics.at("tokens"), 4);
    EXPECT_EQ(out.metrics.sums[2 * PolicyMetrics::kRatio + 1], 2);
    EXPECT_EQ(out.metrics.sums[2 * PolicyMetrics::kPolicyLoss + 1], 4);
  }
}

}  // namespace
}  // namespace tether
