#include "rl/policy/gmpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/gspo.h"
#include "tests/error_message.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// A row of two tokens whose log-ratios are these.
Batch<double> row_of(double first, double second, double advantage) {
  Batch<double> out(1, 2);
  out.mask = {1, 1};
  out.old_logps = {-1, -1};
  out.logps = {first - 1, second - 1};
  out.advantages = {advantage, advantage};
  return out;
}

// Log-ratios of 1 and 0.2 count as 0.4 and 0.2 where A > 0: a ratio of e^0.3. Only the second
// moves.
TEST(Gmpo, ATokenBeyondItsBoundCountsAsTheBoundAndDoesNotMove) {
  Batch<double> good = row_of(1, 0.2, 2);
  EXPECT_DOUBLE_EQ(good.run(presets::gmpo()).loss, -2 * std::exp(0.3));
  EXPECT_EQ(good.dlogps[0], 0);
  EXPECT_DOUBLE_EQ(good.dlogps[1], -2 * std::exp(0.3) / 2);
}

// The same ones count as they are where A < 0, and -1 as -0.4.
TEST(Gmpo, TheSideIsTheOneThatTheAdvantageAsksFor) {
  Batch<double> bad = row_of(1, 0.2, -1);
  EXPECT_DOUBLE_EQ(bad.run(presets::gmpo()).loss, std::exp(0.6));
  EXPECT_DOUBLE_EQ(bad.dlogps[0], std::exp(0.6) / 2);
  Batch<double> rarer = row_of(-1, 0.2, -1);
  EXPECT_DOUBLE_EQ(rarer.run(presets::gmpo()).loss, std::exp(-0.1));
  EXPECT_EQ(rarer.dlogps[0], 0);
  EXPECT_DOUBLE_EQ(rarer.dlogps[1], std::exp(-0.1) / 2);
}

TEST(Gmpo, AtABoundTheGradientIsTheOneInside) {
  Batch<double> batch = row_of(0.5, 0, 1);
  EXPECT_DOUBLE_EQ(batch.run(presets::gmpo(0.5)).loss, -std::exp(0.25));
  EXPECT_DOUBLE_EQ(batch.dlogps[0], -std::exp(0.25) / 2);
}

TEST(Gmpo, WithoutAClipItIsGspoWithoutOne) {
  Batch<double> batch(3, 40);
  PolicyObjective off = presets::gmpo(infinity), gspo = presets::gspo();
  gspo.surrogate = off.surrogate;
  EXPECT_EQ(batch.run(off).loss, batch.run(gspo).loss);
}

TEST(Gmpo, OtherLevelsDoNotClip) {
  Batch<double> batch(3, 40);
  PolicyObjective clipped = presets::gmpo();
  clipped.level = RatioLevel::token;
  PolicyObjective off = clipped;
  off.log_ratio_clip = {};
  EXPECT_EQ(batch.run(clipped).loss, batch.run(off).loss);
}

TEST(Gmpo, APenaltyThroughTheRatioIsRefused) {
  PolicyObjective objective = presets::gmpo();
  objective.kl.beta = 0.1;
  objective.kl.correction = KlCorrection::level_ratio;
  EXPECT_EQ(message([&] { check_objective("f", objective); }),
            "f: kl_correction must not be level_ratio where log-ratios are clipped, got it. Pass "
            "detached_level_ratio or another");
}

}  // namespace
}  // namespace tether
