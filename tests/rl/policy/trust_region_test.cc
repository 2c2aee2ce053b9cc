#include "rl/policy/trust_region.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/cispo.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

double weight_of(double p, double old_p, double advantage) {
  const TvMask formula{.low = 0.25, .high = 0.125};
  const WeightToken<Constant<double>> token{
      {std::log(p)}, {std::log(old_p)}, {-1}, {-1}, {advantage}};
  return formula(token, formula.measure(token)).value;
}

TEST(TvMask, StopsATokenThatMovedItsProbabilityTooFarAlongItsAdvantage) {
  EXPECT_EQ(weight_of(0.60, 0.5, +1), 1);
  EXPECT_EQ(weight_of(0.65, 0.5, +1), 0);
  EXPECT_EQ(weight_of(0.10, 0.5, +1), 1);  // it comes back
  EXPECT_EQ(weight_of(0.30, 0.5, -1), 1);
  EXPECT_EQ(weight_of(0.20, 0.5, -1), 0);
  EXPECT_EQ(weight_of(0.90, 0.5, -1), 1);
  EXPECT_EQ(weight_of(0.20, 0.5, 0), 0);  // as for a bad token
}

TEST(TvMask, LetsRareTokensMoveByAnyRatio) { EXPECT_EQ(weight_of(1e-3, 1e-9, +1), 1); }

double kl_weight_of(double p, double old_p, double advantage) {
  const KlMask formula{.low = 0.05, .high = 0.1};
  const WeightToken<Constant<double>> token{
      {std::log(p)}, {std::log(old_p)}, {-1}, {-1}, {advantage}};
  return formula(token, formula.measure(token)).value;
}

// KL(0.5 || p) is 0.0589 at p = 0.667 and 0.333, 0.1438 at 0.75 and 0.25.
TEST(KlMask, StopsATokenThatMovedTooFarAlongItsAdvantage) {
  EXPECT_EQ(kl_weight_of(0.667, 0.5, +1), 1);
  EXPECT_EQ(kl_weight_of(0.75, 0.5, +1), 0);
  EXPECT_EQ(kl_weight_of(0.25, 0.5, +1), 1);  // it comes back
  EXPECT_EQ(kl_weight_of(0.4, 0.5, -1), 1);
  EXPECT_EQ(kl_weight_of(0.333, 0.5, -1), 0);
  EXPECT_EQ(kl_weight_of(0.75, 0.5, -1), 1);
  EXPECT_EQ(kl_weight_of(0.333, 0.5, 0), 0);  // as for a bad token
}

TEST(KlMask, IsANumberWhereATokenIsCertain) {
  EXPECT_EQ(kl_weight_of(1, 1, +1), 1);
  EXPECT_EQ(kl_weight_of(1, 0.5, +1), 0);
  EXPECT_EQ(kl_weight_of(0.5, 1, -1), 0);
  EXPECT_EQ(kl_weight_of(1.0000001, 1, +1), 1);  // above 1 by rounding
}

TEST(TvBand, StopsATokenOnBothSides) {
  const TvBand formula{.high = 0.125};
  const auto weight = [&](double p, double old_p) {
    const WeightToken<Constant<double>> token{{std::log(p)}, {std::log(old_p)}, {-1}, {-1}, {1}};
    return formula(token, formula.measure(token)).value;
  };
  EXPECT_EQ(weight(0.6, 0.5), 1);
  EXPECT_EQ(weight(0.4, 0.5), 1);
  EXPECT_EQ(weight(0.63, 0.5), 0);
  EXPECT_EQ(weight(0.37, 0.5), 0);
}

// The old probability is e^-1 = 0.3679. The tokens of the first answer moved by +0.0368, +0.1839
// and -0.1839, that of the second by -0.1839.
TEST(TvMask, ZeroesLossAndSlopeAndNothingElse) {
  Batch<double> batch = two_answers();
  PolicyObjective objective = presets::cispo();
  objective.weights = {{TvMask{.low = 0.1, .high = 0.1}}};
  const double first = std::log(1.1) - 1, third = std::log(0.5) - 1;
  expect_loss_and_slopes(batch, objective, (-1.1 * 2 * first - 0.5 * 2 * third) / 4,
                         {-1.1 * 2 / 4, 0, -0.5 * 2 / 4, 0, 0, 0});
  const auto metrics = batch.run(objective).metrics.to_map();
  EXPECT_EQ(metrics.at("weight_zero_fraction"), 0.5);
  EXPECT_EQ(metrics.at("weight_mean"), 0.5);
  EXPECT_EQ(metrics.at("tokens"), 4);
  EXPECT_EQ(metrics.at("nonfinite"), 0);
}

}  // namespace
}  // namespace tether
