#include "rl/policy/chord.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

double weight_of(double logp) {
  const WeightToken<Constant<double>> token{{logp}, {0}, {0}, {0}, {1}};
  return Uncertainty{}(token, Uncertainty{}.measure(token)).value;
}

TEST(Uncertainty, IsTheVarianceOfTheChoice) {
  EXPECT_DOUBLE_EQ(weight_of(std::log(0.25)), 0.1875);
  EXPECT_DOUBLE_EQ(weight_of(std::log(0.5)), 0.25);
  EXPECT_EQ(weight_of(0), 0);
  EXPECT_EQ(weight_of(1e-9), 0);  // a chance above 1 by rounding
}

TEST(Uncertainty, OfACertainTokenDoesNotCancel) { EXPECT_NEAR(weight_of(-1e-20), 1e-20, 1e-35); }

}  // namespace
}  // namespace tether
