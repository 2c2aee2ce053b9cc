#include "rl/policy/masked_ratio.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

TEST(MaskedRatio, IsTheRatioWithinItsBounds) {
  const MaskedRatio formula{.low = 0.5, .high = 2};
  const WeightToken<Constant<double>> token{{-1}, {-1.5}, {0}, {0}, {1}};
  EXPECT_DOUBLE_EQ(formula.measure(token).value, 0.5);
  for (const double ratio : {0.4, 2.1}) {
    EXPECT_EQ(formula(token, Constant<double>{std::log(ratio)}).value, 0);
  }
  EXPECT_DOUBLE_EQ(formula(token, Constant<double>{std::log(1.9)}).value, 1.9);
}

}  // namespace
}  // namespace tether
