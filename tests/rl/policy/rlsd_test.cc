#include "rl/policy/rlsd.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tether {
namespace {

double weight_of(double x, double advantage) {
  const SelfDistillation formula{.mix = 0.25, .epsilon = 0.5};
  const WeightToken<Constant<double>> token{{-2}, {0}, {-2 + x}, {0}, {advantage}};
  return formula(token, formula.measure(token)).value;
}

TEST(SelfDistillation, GivesTheTokensThatTheTeacherFavoursMore) {
  EXPECT_DOUBLE_EQ(weight_of(std::log(1.25), +1), 0.75 + 0.25 * 1.25);
  EXPECT_DOUBLE_EQ(weight_of(std::log(1.25), -1), 0.75 + 0.25 / 1.25);
  EXPECT_DOUBLE_EQ(weight_of(0, 1), 1);
  EXPECT_EQ(weight_of(2, 0), 1);
}

TEST(SelfDistillation, WithinItsBounds) {
  EXPECT_DOUBLE_EQ(weight_of(+9, +1), 0.75 + 0.25 * 1.5);
  EXPECT_DOUBLE_EQ(weight_of(-9, +1), 0.75 + 0.25 * 0.5);
  EXPECT_DOUBLE_EQ(weight_of(-9, -1), 0.75 + 0.25 * 1.5);
}

}  // namespace
}  // namespace tether
