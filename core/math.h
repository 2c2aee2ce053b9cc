#pragma once

#include <cstdint>
#include <limits>

#include "bit_cast.h"
#include "macros.h"

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error "tether: core/math.h needs IEEE arithmetic, compile without -ffast-math"
#endif

// Elementary functions for vector loops: branch-free templates over T = float | double, no calls.
//
// NaN in, NaN out; subnormal arguments and results are as good as any; rounding to nearest is
// assumed. GCC vectorises a loop over any of them with -O3 -fno-math-errno -fno-trapping-math.
// With -ffp-contract=off the bits are the same on every instruction set.
// Coefficients: tests/core/make_math_polynomials.py.
namespace tether::math {

// Largest error, in units of the last place of the exact result (below the normal range: of the
// smallest subnormal). Beside each: the worst of all floats, and of a million random doubles,
// rounded up. The float bounds are therefore facts, the double ones what was found plus a margin.
// The tests hold with fused products as well.
template <class T>
inline constexpr double kExpUlp = 1;  // 0.868, 0.854
template <class T>
inline constexpr double kExpm1Ulp = 1.25;  // 1.058, 1.149
template <class T>
inline constexpr double kLogUlp = 1;  // 0.918, 0.827
template <class T>
inline constexpr double kLogQuotientUlp = 2;  // 1.972, 1.931: of random numbers both
template <class T>
inline constexpr double kLog1pUlp = 1;  // 0.966, 0.798
template <class T>
inline constexpr double kSigmoidUlp = 2;  // 1.806, 1.674
template <class T>
inline constexpr double kLogSigmoidUlp = 2;  // 1.751, 1.449
template <class T>
inline constexpr double kLog1mexpUlp = 1.25;  // 1.019, 0.987
template <class T>
inline constexpr double kExpm1MinusUlp = 1.75;  // 1.674, 1.468

namespace detail {

template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRounder = 0x1.8p23f;    // x + kRounder - kRounder is x as an integer
  static constexpr float kIntegerBase = 0x1p23f;  // its bits or-ed with k are those of 2^23 + k
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: n * kLn2High is exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kSqrtHalf = 0x1.6a09e6p-1f;
  static constexpr float kExpMin = -104.0f;         // e^x is 0 after rounding
  static constexpr float kExpMax = 89.0f;           // e^x is inf
  static constexpr float kExpm1Min = -18.0f;        // e^x - 1 is -1
  static constexpr float kOneMinusExpMin = -20.0f;  // log(1 - e^x) is -e^x
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  static constexpr float kLeastNormal = 0x1p-126f;
  static constexpr float kEpsilon = 0x1p-23f;  // 1 and the next number
  static constexpr float kSubnormalScale = 0x1p25f;
  static constexpr float kSubnormalLog2 = 25.0f;
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kIntegerBase = 0x1p52;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefp-1;  // 33 bits
  static constexpr double kLn2Low = 0x1.473de6af278edp-34;
  static constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
  static constexpr double kExpMin = -746.0;
  static constexpr double kExpMax = 710.0;
  static constexpr double kExpm1Min = -38.0;
  static constexpr double kOneMinusExpMin = -40.0;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  static constexpr double kLeastNormal = 0x1p-1022;
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr double kSubnormalScale = 0x1p54;
  static constexpr double kSubnormalLog2 = 54.0;
};

template <class T>
using Bits = typename Format<T>::Bits;

// c0 + x * (c1 + x * (c2 + ...))
template <class T>
TETHER_INLINE constexpr T polynomial(T, T c0) {
  return c0;
}
template <class T, class... Rest>
TETHER_INLINE constexpr T polynomial(T x, T c0, T c1, Rest... rest) {
  return c0 + x * polynomial(x, c1, rest...);
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2; error relative to (e^r - 1) / r: 2^-29 and 2^-58.
TETHER_INLINE float exp_polynomial(float r) {
  return polynomial(r, 0.5f, 0x1.555556p-3f, 0x1.5554e8p-5f, 0x1.1110ep-7f, 0x1.6d433ap-10f,
                    0x1.a12506p-13f);
}
TETHER_INLINE double exp_polynomial(double r) {
  return polynomial(r, 0.5, 0x1.5555555555556p-3, 0x1.5555555555555p-5, 0x1.11111111109b1p-7,
                    0x1.6c16c16c167ep-10, 0x1.a01a01a7c5dp-13, 0x1.a01a01a47bfdap-16,
                    0x1.71de0da7cb47ap-19, 0x1.27e4e1f0c0996p-22, 0x1.af38b95ff4cbdp-26,
                    0x1.1f66e8758facdp-29);
}

// (e^d - 1 - d - d^2 / 2) / d^3 for |d| <= 1/2; error relative to (e^d - 1 - d) / d^3: 2^-27,
// 2^-56.
TETHER_INLINE float cubic_polynomial(float d) {
  return polynomial(d, 0x1.555556p-3f, 0x1.555556p-5f, 0x1.11104p-7f, 0x1.6c161ap-10f,
                    0x1.a2463ap-13f, 0x1.a1d6ccp-16f);
}
TETHER_INLINE double cubic_polynomial(double d) {
  return polynomial(d, 0x1.5555555555555p-3, 0x1.5555555555555p-5, 0x1.111111111112p-7,
                    0x1.6c16c16c16c1ep-10, 0x1.a01a01a00ef0fp-13, 0x1.a01a01a01479bp-16,
                    0x1.71de3a84a10c3p-19, 0x1.27e4fb8f228d8p-22, 0x1.ae63a07779c78p-26,
                    0x1.1eed340187c69p-29, 0x1.6267cf434f12cp-33, 0x1.94daa8b902cd5p-37);
}

// log(1 + f) - f for sqrt(1/2) <= 1 + f <= sqrt(2); error relative to log(1 + f): 2^-28 and 2^-57.
TETHER_INLINE float log1p_minus(float f) {
  const float p =
      polynomial(f, 0x1.555554p-2f, -0x1.fffffcp-3f, 0x1.999d5ap-3f, -0x1.555b4ap-3f,
                 0x1.23d218p-3f, -0x1.fcf4c6p-4f, 0x1.dea29p-4f, -0x1.d635c8p-4f, 0x1.1d8e8ap-4f);
  return f * f * (f * p - 0.5f);
}
// With s = f / (2 + f): log(1 + f) = 2 s + s^3 R(s^2) = f - f^2/2 + s (f^2/2 + s^2 R(s^2)).
TETHER_INLINE double log1p_minus(double f) {
  const double s = f / (2.0 + f);
  const double z = s * s;
  const double half_square = 0.5 * f * f;
  const double p = polynomial(z, 0x1.5555555555558p-1, 0x1.9999999995275p-2, 0x1.2492492dfd4e2p-2,
                              0x1.c71c62d62d688p-3, 0x1.7462b907093b9p-3, 0x1.39fdcf94a70bap-3,
                              0x1.2b5f47c783df2p-3);
  return s * (half_square + z * p) - half_square;
}

// (log((1 + s) / (1 - s)) - 2 s) / s^3 at z = s^2 for |s| <= 0.2005; error relative to the
// logarithm: 2^-30 and 2^-60.
TETHER_INLINE float atanh_polynomial(float z) {
  return polynomial(z, 0x1.555556p-1f, 0x1.999a7p-2f, 0x1.242b1ep-2f, 0x1.e69ed6p-3f);
}
TETHER_INLINE double atanh_polynomial(double z) {
  return polynomial(z, 0x1.5555555555555p-1, 0x1.9999999999f6dp-2, 0x1.24924923d4f3dp-2,
                    0x1.c71c72eba7680p-3, 0x1.745ca87f82f79p-3, 0x1.3b2a6674b2003p-3,
                    0x1.0e80d16e0d7ecp-3, 0x1.16f4812d3f380p-3);
}

// 2^n for n in the normal range, n in two's complement.
template <class T>
TETHER_INLINE T power_of_two(Bits<T> n) {
  return bit_cast<T>(static_cast<Bits<T>>((n + Format<T>::kBias) << Format<T>::kMantissaBits));
}

// e^x = 2^n (1 + r + w) with |r| <= log(2) / 2 exact and |w| < 0.07 rounded, by Cody and Waite.
template <class T>
struct ReducedExp {
  Bits<T> n;
  T r, w;
};

template <class T>
TETHER_INLINE ReducedExp<T> reduce_exp(T x, T lowest, T highest = Format<T>::kExpMax) {
  using F = Format<T>;
  const T below = x > highest ? highest : x;
  const T z = below < lowest ? lowest : below;
  const T shifted = z * F::kLog2E + F::kRounder;
  const T n = shifted - F::kRounder;
  const T r = z - n * F::kLn2High;
  const T low = n * F::kLn2Low;
  const T rest = r - low;
  return {bit_cast<Bits<T>>(shifted) - bit_cast<Bits<T>>(F::kRounder), r,
          rest * rest * exp_polynomial(rest) - low};
}

// value * 2^n for n far outside of the exponent's range too, rounded once: the first factor is
// exact for a value near 1.
template <class T>
TETHER_INLINE T scale(T value, Bits<T> n) {
  using F = Format<T>;
  const Bits<T> biased = n + 2 * F::kBias;
  const Bits<T> half = biased >> 1;
  return value * bit_cast<T>(static_cast<Bits<T>>(half << F::kMantissaBits)) *
         bit_cast<T>(static_cast<Bits<T>>((biased - half) << F::kMantissaBits));
}

// high + low, for a number that needs more than one T.
template <class T>
struct Sum {
  T high, low;
};

// (e^x - 1) / 2; half of it does not overflow before all of it. 2^n - 1 + 2^n r is added without
// loss.
template <class T>
TETHER_INLINE Sum<T> half_expm1(T x, T highest = Format<T>::kExpMax) {
  const auto e = reduce_exp(x, Format<T>::kExpm1Min, highest);
  const T s = power_of_two<T>(e.n - 1);
  const T a = s - T(0.5);
  const T b = s * e.r;
  const T high = a + b;
  return {high, (b - (high - a)) + s * e.w};
}

// log(u) - scale_log2 * log(2) + correction for normal finite u > 0.
// The correction is for log(u + c) = log(u) + c / u, |c| <= ulp(u).
template <class T>
TETHER_INLINE T log_of_normal(T u, T correction, T scale_log2 = T(0)) {
  using F = Format<T>;
  constexpr Bits<T> kOffset = bit_cast<Bits<T>>(T(1)) - bit_cast<Bits<T>>(F::kSqrtHalf);
  constexpr Bits<T> kMantissaMask = (Bits<T>(1) << F::kMantissaBits) - 1;
  const Bits<T> bits = bit_cast<Bits<T>>(u) + kOffset;
  const Bits<T> biased = (bits >> F::kMantissaBits) | bit_cast<Bits<T>>(F::kIntegerBase);
  const T k = bit_cast<T>(biased) - (F::kIntegerBase + T(F::kBias) + scale_log2);
  const T f = bit_cast<T>((bits & kMantissaMask) + bit_cast<Bits<T>>(F::kSqrtHalf)) - T(1);
  const T a = k * F::kLn2High;
  const T high = a + f;
  return high + ((f - (high - a)) + ((log1p_minus(f) + correction) + k * F::kLn2Low));
}

// logarithm where 0 < x < inf, the value of log(x) at the other x.
template <class T>
TETHER_INLINE T log_with_edges(T x, T logarithm) {
  using F = Format<T>;
  const T edge = x == T(0) ? -F::kInfinity : (x > T(0) ? x : F::kNaN);
  return x > T(0) && x < F::kInfinity ? logarithm : edge;
}

// log(x) + correction for every x.
template <class T>
TETHER_INLINE T log_of(T x, T correction) {
  using F = Format<T>;
  const bool subnormal = x < F::kLeastNormal;
  const T normal = subnormal ? x * F::kSubnormalScale : x;
  const T scale_log2 = subnormal ? F::kSubnormalLog2 : T(0);
  return log_with_edges(x, log_of_normal(normal, correction, scale_log2));
}

}  // namespace detail

// e^x. inf for x > 88.72 (709.78); gradual underflow below -87.33 (-708.39), 0 below -103.97
// (-745.13). exp(+-0) = 1, exp(-inf) = 0, exp(inf) = inf.
// With bounds, narrower than those: e^clamp(x, lowest, highest) at no further cost.
template <class T>
TETHER_INLINE T exp(T x, T lowest = detail::Format<T>::kExpMin,
                    T highest = detail::Format<T>::kExpMax) {
  const auto e = detail::reduce_exp(x, lowest, highest);
  return detail::scale(T(1) + (e.r + e.w), e.n);
}

// e^x - 1, in [-1, inf], without cancellation near 0. Derivative: exp(x).
// expm1(+-0) = +-0, expm1(-inf) = -1, expm1(inf) = inf. `highest`: as in exp.
template <class T>
TETHER_INLINE T expm1(T x, T highest = detail::Format<T>::kExpMax) {
  const auto half = detail::half_expm1(x, highest);
  const T magnitude = x < T(0) ? -x : x;
  return magnitude < detail::Format<T>::kEpsilon / 4 ? x : T(2) * (half.high + half.low);
}

// Natural logarithm, x > 0. log(+-0) = -inf, log(x < 0) = NaN, log(1) = 0, log(inf) = inf.
template <class T>
TETHER_INLINE T log(T x) {
  return detail::log_of(x, T(-0.0));
}

// log(u / v) of normal u, v > 0 whose quotient and sum are normal too, for less than log(): near
// u = v it is as good as elsewhere. Of other numbers anything.
//   u / v = 2^k (1 + s) / (1 - s),   s = (u - w) / (u + w),   w = 2^k v
// with a k that the bits of u and v tell, so that |s| < 0.2005.
template <class T>
TETHER_INLINE T log_quotient(T u, T v) {
  using F = detail::Format<T>;
  using Bits = detail::Bits<T>;
  const Bits apart = bit_cast<Bits>(u) - bit_cast<Bits>(v);
  const Bits biased = (apart + bit_cast<Bits>(T(1.5))) >> F::kMantissaBits;
  const T w = v * bit_cast<T>(static_cast<Bits>(biased << F::kMantissaBits));
  const T k =
      bit_cast<T>(biased | bit_cast<Bits>(F::kIntegerBase)) - (F::kIntegerBase + T(F::kBias));
  const T s = (u - w) / (u + w), z = s * s;
  const T tail = s * z * detail::atanh_polynomial(z) + k * F::kLn2Low;
  return k * F::kLn2High + ((s + s) + tail);
}

// log(1 + x), x > -1, without loss near 0: log(u) + c / u, where u + c is 1 + x without rounding.
// log1p(+-0) = +-0, log1p(-1) = -inf, log1p(x < -1) = NaN, log1p(inf) = inf.
template <class T>
TETHER_INLINE T log1p(T x) {
  const T larger = x > T(1) ? x : T(1);
  const T smaller = x > T(1) ? T(1) : x;
  const T u = T(1) + x;
  const T c = smaller - (u - larger);
  return x == T(0) ? x : detail::log_with_edges(u, detail::log_of_normal(u, c / u));
}

// 1 / (1 + e^-x), in [0, 1]. With y = e^-|x|, which does not overflow:
//   x < 0:   y / (1 + y) = y - y * y / (1 + y)
//   x >= 0:  1 / (1 + y) = 1 - y / (1 + y)
// Gradual underflow like exp; sigmoid(-inf) = 0, sigmoid(inf) = 1.
// Derivative: sigmoid(x) sigmoid(-x).
template <class T>
TETHER_INLINE T sigmoid(T x) {
  const T y = exp(x < T(0) ? x : -x);
  const T numerator = x < T(0) ? y : T(1);
  return numerator - numerator * (y / (T(1) + y));
}

// log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e^-|x|), never positive.
// log_sigmoid(-inf) = -inf, log_sigmoid(inf) = 0. Derivative: sigmoid(-x).
template <class T>
TETHER_INLINE T log_sigmoid(T x) {
  const T y = exp(x < T(0) ? x : -x);
  const T u = T(1) + y;  // in [1, 2]: log1p without its edges
  const T log1p_y = detail::log_of_normal(u, (y - (u - T(1))) / u);
  return (x < T(0) ? x : T(0)) - log1p_y;
}

// log(1 - e^x), x < 0, never positive: no loss near x = 0, where 1 - e^x cancels, nor for large
// -x, where 1 - e^x rounds to 1. 1 - e^x = (1 - s) - s r - s w with s = 2^n, as u + c.
// log1mexp(-inf) = -0, log1mexp(+-0) = -inf, log1mexp(x > 0) = NaN. Derivative: -1 / expm1(-x).
template <class T>
TETHER_INLINE T log1mexp(T x) {
  const auto e = detail::reduce_exp(x, detail::Format<T>::kExpMin);
  const T s = detail::power_of_two<T>(e.n);
  const T a = T(1) - s;
  const T b = s * e.r;
  const T u = a - b;
  const T c = (((a - u) - b) + ((T(1) - a) - s)) - s * e.w;
  const T y = u + c;
  const T near = detail::log_of(y, ((u - y) + c) / y);
  const T far = -detail::scale(T(1) + (e.r + e.w), e.n);
  return x < detail::Format<T>::kOneMinusExpMin ? far : near;
}

// e^x and 1 - e^x for x <= 0, the chance of an event and that of all others, from one reduction: as
// in log1mexp, 1 - e^x = (1 - s) - s r - s w with s = 2^n. What is below `lowest`, a bound within
// the range of normal results, counts as that. Errors: kExpUlp and kExpm1Ulp. NaN in, NaN out.
template <class T>
struct ExpAndOneMinus {
  T exp, one_minus;
};

template <class T>
TETHER_INLINE ExpAndOneMinus<T> exp_and_one_minus(T x, T lowest) {
  const auto e = detail::reduce_exp(x, lowest, detail::Format<T>::kInfinity);
  const T s = detail::power_of_two<T>(e.n);
  return {s * (T(1) + (e.r + e.w)), ((T(1) - s) - s * e.r) - s * e.w};
}

// e^d - 1 - d, never negative: the k3 estimator of KL, without cancellation.
//   |d| < 1/2:  d^2 / 2 + d^3 P(d)
//   else        (e^d - 1) - d with e^d - 1 as the sum of two numbers
// expm1_minus(+-0) = 0, expm1_minus(+-inf) = inf. Derivative: expm1(d). `highest`: as in exp.
template <class T>
TETHER_INLINE T expm1_minus(T d, T highest = detail::Format<T>::kExpMax) {
  const auto half = detail::half_expm1(d, highest);
  const T finite = d > highest ? highest : d;
  const T far = T(2) * ((half.high - T(0.5) * finite) + half.low);
  const T square = d * d;
  const T near = T(0.5) * square + square * (d * detail::cubic_polynomial(d));
  return d > T(-0.5) && d < T(0.5) ? near : far;
}

// e^x and e^x - 1 - x, x clamped to [lowest, highest] within the range of normal results, for
// little more than the price of one: near 0 the second is what the reduction leaves of the first.
// Errors: kExpUlp and 13 ulp, the latter where it is a difference, |x| > 0.35. NaN in, NaN out;
// never negative.
template <class T>
struct ExpAndExpm1Minus {
  T exp, expm1_minus;
};

template <class T>
TETHER_INLINE ExpAndExpm1Minus<T> exp_and_expm1_minus(T x, T lowest, T highest) {
  const auto e = detail::reduce_exp(x, lowest, highest);
  const T exp = (T(1) + (e.r + e.w)) * detail::power_of_two<T>(e.n);
  const T below = x > highest ? highest : x;
  return {exp, e.r == x ? e.w : (exp - T(1)) - below};
}

}  // namespace tether::math
