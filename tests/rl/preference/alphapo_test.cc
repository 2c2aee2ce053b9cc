#include "rl/preference/alphapo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/kernels/preference_loss.h"
#include "rl/preference/dpo.h"

namespace tether {
namespace {

Dual<double> at(double alpha, double score) { return AlphaPo{alpha}(Dual<double>{score, 1}); }

TEST(AlphaPo, IsTheRewardOfThePaperByHand) {
  // alpha 1: 1 - 1 / p with p = 1/2; the slope is 1 / p.
  EXPECT_DOUBLE_EQ(at(1, -std::log(2)).value, -1);
  EXPECT_DOUBLE_EQ(at(1, -std::log(2)).grad, 2);
  // alpha 1/2 and p = 1/16: 2 (1 - 4) with slope 4; alpha -1: p - 1 with slope p.
  EXPECT_DOUBLE_EQ(at(0.5, -std::log(16)).value, -6);
  EXPECT_DOUBLE_EQ(at(0.5, -std::log(16)).grad, 4);
  EXPECT_DOUBLE_EQ(at(-1, -std::log(16)).value, -15.0 / 16);
  EXPECT_DOUBLE_EQ(at(-1, -std::log(16)).grad, 1.0 / 16);
}

TEST(AlphaPo, TheLimitIsTheLogarithm) {
  for (const double alpha : {0.0, 1e-200, -1e-200, 1e-140, 1e-20}) {
    EXPECT_DOUBLE_EQ(at(alpha, -3.5).value, -3.5) << alpha;
    EXPECT_DOUBLE_EQ(at(alpha, -3.5).grad, 1) << alpha;
  }
}

TEST(AlphaPo, SaturatesWithTheSlopeThatItHasThere) {
  EXPECT_DOUBLE_EQ(at(1, -1e6).value, -std::expm1(40));
  EXPECT_DOUBLE_EQ(at(1, -1e6).grad, std::exp(40));
}

TEST(AlphaPo, IsFiniteWherePeersAreNot) {
  for (const double score : {-104.0, -1e5, -1e300}) {
    for (const double alpha : {0.25, 100.0, -100.0}) {
      EXPECT_TRUE(std::isfinite(at(alpha, score).value)) << alpha;
      EXPECT_TRUE(std::isfinite(at(alpha, score).grad)) << alpha;
    }
  }
}

TEST(AlphaPo, ItsOptionIsOneOfTheObjective) {
  PreferenceObjective objective = presets::dpo();
  set_choice("f", objective, "link", "alphapo");
  set_option("f", objective, "link_alpha", 0.5);
  EXPECT_EQ(objective.link.target<AlphaPo>()->alpha, 0.5);
}

}  // namespace
}  // namespace tether
