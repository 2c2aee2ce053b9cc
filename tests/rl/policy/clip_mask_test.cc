#include "rl/policy/clip_mask.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

template <class Mask>
double weight_of(const Mask& mask, double ratio, double advantage) {
  return mask(WeightToken<Constant<double>>{{0}, {0}, {0}, {0}, {advantage}},
              Constant<double>{std::log(ratio)})
      .value;
}

TEST(ClipMask, IsZeroWherePpoClips) {
  const ClipMask mask{.epsilon_low = 0.25, .epsilon_high = 0.5};
  EXPECT_EQ(weight_of(mask, 1.51, +1), 0);
  EXPECT_EQ(weight_of(mask, 1.49, +1), 1);
  EXPECT_EQ(weight_of(mask, 0.01, +1), 1);
  EXPECT_EQ(weight_of(mask, 0.74, -1), 0);
  EXPECT_EQ(weight_of(mask, 0.76, -1), 1);
  EXPECT_EQ(weight_of(mask, 9, -1), 1);
  EXPECT_EQ(weight_of(mask, 9, 0), 1);
}

TEST(RingMask, IsOneNearOneAndFarOnTheWrongSide) {
  const RingMask mask{.epsilon_low = 0.25, .epsilon_high = 0.5, .far_low = 0.5, .far_high = 0.75};
  for (const double A : {-1.0, 0.0, 1.0}) {
    EXPECT_EQ(weight_of(mask, 0.76, A), 1);
    EXPECT_EQ(weight_of(mask, 1.49, A), 1);
    EXPECT_EQ(weight_of(mask, 0.74, A), 0);
    EXPECT_EQ(weight_of(mask, 1.51, A), 0);
  }
  EXPECT_EQ(weight_of(mask, 0.49, +1), 1);
  EXPECT_EQ(weight_of(mask, 0.49, -1), 0);
  EXPECT_EQ(weight_of(mask, 0.49, 0), 0);
  EXPECT_EQ(weight_of(mask, 1.76, -1), 1);
  EXPECT_EQ(weight_of(mask, 1.76, +1), 0);
}

TEST(RingMask, WithoutARingNoneComeBack) {
  const RingMask mask{.far_low = 1, .far_high = infinity};
  EXPECT_EQ(weight_of(mask, 1e-9, +1), 0);
  EXPECT_EQ(weight_of(mask, 1e9, -1), 0);
}

}  // namespace
}  // namespace tether
