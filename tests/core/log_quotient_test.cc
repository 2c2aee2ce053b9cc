#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/math.h"

namespace tether {
namespace {

// In the last places of the exact result.
template <class T>
double error_of(T u, T v) {
  const auto wide = [](T x) { return static_cast<long double>(x); };
  const long double apart = (wide(u) - wide(v)) / wide(v);  // the difference of near ones is exact
  const bool near = std::abs(apart) < 0.25L;
  const long double exact = near ? std::log1p(apart) : std::log(wide(u) / wide(v));
  const T size = T(std::abs(exact));
  const double ulp = double(std::nextafter(size, std::numeric_limits<T>::infinity()) - size);
  return double(std::abs(wide(math::log_quotient(u, v)) - exact)) / ulp;
}

template <class T>
void expect_within_its_bound() {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-18.5, 0.1);
  for (int i = 0; i < 1000000; ++i) {
    const T u = T(std::exp(exponent(random)));
    const T far = T(std::exp(exponent(random))), near = T(double(u) * (1 + exponent(random) / 500));
    ASSERT_LE(error_of(u, far), math::kLogQuotientUlp<T>) << u << " " << far;
    ASSERT_LE(error_of(u, near), math::kLogQuotientUlp<T>) << u << " " << near;
    const T next = std::nextafter(u, T(2));
    ASSERT_LE(error_of(u, next), math::kLogQuotientUlp<T>) << u;
    ASSERT_EQ(math::log_quotient(u, u), 0);
  }
}

TEST(LogQuotient, OfFloatsIsWithinItsBound) { expect_within_its_bound<float>(); }
TEST(LogQuotient, OfDoublesIsWithinItsBound) { expect_within_its_bound<double>(); }

TEST(LogQuotient, OfFarNumbers) {
  EXPECT_FLOAT_EQ(math::log_quotient(1e37f, 1.0f), std::log(1e37f));
  EXPECT_FLOAT_EQ(math::log_quotient(1e-18f, 1e18f), std::log(1e-36f));
  EXPECT_DOUBLE_EQ(math::log_quotient(1e-150, 1e150), std::log(1e-300));
}

}  // namespace
}  // namespace tether
