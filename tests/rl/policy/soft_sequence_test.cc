#include "rl/policy/soft_sequence.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

double weight_of(double rho, double advantage) {
  const SoftSequenceWeight formula{};
  return formula(WeightToken<Constant<double>>{{0}, {0}, {0}, {0}, {advantage}},
                 Constant<double>{std::log(rho)})
      .value;
}

TEST(SoftSequence, IsOneOnPolicyAndLargestAtKOverLambda) {
  for (const double A : {1.0, -1.0}) EXPECT_DOUBLE_EQ(weight_of(1, A), 1);
  EXPECT_DOUBLE_EQ(weight_of(2.0 / 3, 1), 4.0 / 9 * std::exp(1));
  EXPECT_DOUBLE_EQ(weight_of(1.5, -1), 27.0 / 8 * std::exp(-1));
  for (const double rho : {0.6, 0.72}) EXPECT_LT(weight_of(rho, 1), weight_of(2.0 / 3, 1));
  for (const double rho : {1.4, 1.6}) EXPECT_LT(weight_of(rho, -1), weight_of(1.5, -1));
}

TEST(SoftSequence, FadesTowardsBothEnds) {
  EXPECT_LT(weight_of(1e-9, 1), 1e-15);
  EXPECT_LT(weight_of(1e9, 1), 1e-15);
  for (const double A : {1.0, -1.0}) {
    for (const float x : {1e3f, 1e27f, 3e38f, -1e3f, -3e38f}) {
      const WeightToken<Constant<float>> token{{0}, {0}, {0}, {0}, {float(A)}};
      EXPECT_EQ(SoftSequenceWeight{}(token, Constant<float>{x}).value, 0) << x;
    }
  }
}

}  // namespace
}  // namespace tether
