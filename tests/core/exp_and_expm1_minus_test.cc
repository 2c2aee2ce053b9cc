#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/number.h"

namespace tether {
namespace {

// Of the last place of a number that is not smaller than the smallest normal one.
double ulp(float exact) {
  const float size = std::max(std::abs(exact), std::numeric_limits<float>::min());
  return double(std::nextafter(size, INFINITY)) - double(size);
}

math::ExpAndExpm1Minus<float> at(float x) { return math::exp_and_expm1_minus(x, -60.0f, 60.0f); }

TEST(ExpAndExpm1Minus, IsWithinItsBoundsOfTheTwoFunctions) {
  for (uint32_t bits = 0; bits < 0xFFF00000u; bits += 0x1009u) {
    const float x = std::bit_cast<float>(bits);
    if (!(std::abs(x) <= 60)) continue;
    const auto both = at(x);
    const double exp = std::exp(double(x));
    const double minus = math::expm1_minus(double(x));
    ASSERT_LE(std::abs(double(both.exp) - exp), math::kExpUlp<float> * ulp(float(exp))) << x;
    ASSERT_LE(std::abs(double(both.expm1_minus) - minus), 13 * ulp(float(minus))) << x;
    ASSERT_GE(both.expm1_minus, 0) << x;
  }
}

TEST(ExpAndExpm1Minus, SaturatesAndKeepsNaN) {
  EXPECT_EQ(at(1e9f).exp, at(60.0f).exp);
  EXPECT_EQ(at(1e9f).expm1_minus, at(60.0f).expm1_minus);
  EXPECT_EQ(at(-1e9f).exp, at(-60.0f).exp);
  EXPECT_FLOAT_EQ(at(-1e9f).expm1_minus, 1e9f);
  EXPECT_TRUE(std::isnan(at(NAN).exp));
  EXPECT_TRUE(std::isnan(at(NAN).expm1_minus));
}

}  // namespace
}  // namespace tether
