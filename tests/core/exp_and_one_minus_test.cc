#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/number.h"

namespace tether {
namespace {

// Of the last place of a number.
template <class T>
double ulp(T exact) {
  return double(std::nextafter(exact, std::numeric_limits<T>::infinity()) - exact);
}

TEST(ExpAndOneMinus, IsWithinItsBoundsOfTheTwoFunctions) {
  for (uint32_t bits = 0x80000000u; bits < 0xC2700000u; bits += 0x405u) {
    const float x = std::bit_cast<float>(bits);  // from -0 to -60
    const auto both = math::exp_and_one_minus(x, -60.0f);
    const double exp = std::exp(double(x)), other = -std::expm1(double(x));
    ASSERT_LE(std::abs(double(both.exp) - exp), math::kExpUlp<float> * ulp(float(exp))) << x;
    ASSERT_LE(std::abs(double(both.one_minus) - other), math::kExpm1Ulp<float> * ulp(float(other)))
        << x;
    ASSERT_GE(both.one_minus, 0) << x;
    ASSERT_LE(both.one_minus, 1) << x;
  }
}

TEST(ExpAndOneMinus, InDoubleToo) {
  for (double x = -1e-300; x > -600; x *= 1.0037) {
    const auto both = math::exp_and_one_minus(x, -600.0);
    const long double exp = std::exp(static_cast<long double>(x));
    const long double other = -std::expm1(static_cast<long double>(x));
    ASSERT_LE(std::abs(double(both.exp - exp)), math::kExpUlp<double> * ulp(double(exp))) << x;
    ASSERT_LE(std::abs(double(both.one_minus - other)),
              math::kExpm1Ulp<double> * ulp(double(other)))
        << x;
  }
}

TEST(ExpAndOneMinus, SaturatesAndKeepsNaN) {
  EXPECT_EQ(math::exp_and_one_minus(-1e9f, -60.0f).exp, math::exp(-60.0f));
  EXPECT_EQ(math::exp_and_one_minus(-INFINITY, -60.0f).one_minus, 1);
  EXPECT_EQ(math::exp_and_one_minus(-0.0f, -60.0f).exp, 1);
  EXPECT_EQ(math::exp_and_one_minus(0.0f, -60.0f).one_minus, 0);
  EXPECT_TRUE(std::isnan(math::exp_and_one_minus(NAN, -60.0f).exp));
  EXPECT_TRUE(std::isnan(math::exp_and_one_minus(NAN, -60.0f).one_minus));
}

}  // namespace
}  // namespace tether
