#include "rl/policy/trust_region.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/cispo.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// Of a token whose probability moved from old_p to p.
template <class Mask>
double weight_of(const Mask& mask, double p, double old_p, double advantage) {
  const WeightToken<Constant<double>> token{
      {std::log(p)}, {std::log(old_p)}, {-1}, {-1}, {advantage}};
  return mask(token, mask.measure(token)).value;
}

constexpr TvMask kTv{.low = 0.25, .high = 0.125};
constexpr KlMask kKl{.low = 0.05, .high = 0.1};
constexpr TvBand kBand{.high = 0.125};

TEST(TvMask, StopsATokenThatMovedItsProbabilityTooFarAlongItsAdvantage) {
  EXPECT_EQ(weight_of(kTv, 0.60, 0.5, +1), 1);
  EXPECT_EQ(weight_of(kTv, 0.65, 0.5, +1), 0);
  EXPECT_EQ(weight_of(kTv, 0.10, 0.5, +1), 1);  // it comes back
  EXPECT_EQ(weight_of(kTv, 0.30, 0.5, -1), 1);
  EXPECT_EQ(weight_of(kTv, 0.20, 0.5, -1), 0);
  EXPECT_EQ(weight_of(kTv, 0.90, 0.5, -1), 1);
  EXPECT_EQ(weight_of(kTv, 0.20, 0.5, 0), 0);  // as for a bad token
}

TEST(TvMask, LetsRareTokensMoveByAnyRatio) { EXPECT_EQ(weight_of(kTv, 1e-3, 1e-9, +1), 1); }

// KL(0.5 || p) is 0.0589 at p = 0.667 and 0.333, 0.1438 at 0.75 and 0.25.
TEST(KlMask, StopsATokenThatMovedTooFarAlongItsAdvantage) {
  EXPECT_EQ(weight_of(kKl, 0.667, 0.5, +1), 1);
  EXPECT_EQ(weight_of(kKl, 0.75, 0.5, +1), 0);
  EXPECT_EQ(weight_of(kKl, 0.25, 0.5, +1), 1);  // it comes back
  EXPECT_EQ(weight_of(kKl, 0.4, 0.5, -1), 1);
  EXPECT_EQ(weight_of(kKl, 0.333, 0.5, -1), 0);
  EXPECT_EQ(weight_of(kKl, 0.75, 0.5, -1), 1);
  EXPECT_EQ(weight_of(kKl, 0.333, 0.5, 0), 0);  // as for a bad token
}

TEST(KlMask, IsANumberWhereATokenIsCertain) {
  EXPECT_EQ(weight_of(kKl, 1, 1, +1), 1);
  EXPECT_EQ(weight_of(kKl, 1, 0.5, +1), 0);
  EXPECT_EQ(weight_of(kKl, 0.5, 1, -1), 0);
  EXPECT_EQ(weight_of(kKl, 1.0000001, 1, +1), 1);  // above 1 by rounding
}

TEST(TvBand, StopsATokenOnBothSides) {
  EXPECT_EQ(weight_of(kBand, 0.6, 0.5, 1), 1);
  EXPECT_EQ(weight_of(kBand, 0.4, 0.5, 1), 1);
  EXPECT_EQ(weight_of(kBand, 0.63, 0.5, 1), 0);
  EXPECT_EQ(weight_of(kBand, 0.37, 0.5, 1), 0);
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
