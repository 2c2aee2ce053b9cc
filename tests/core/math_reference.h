#pragma once

// What core/math.h is measured against: the same functions composed of a wider type's own exp,
// expm1, log, log1p (double for float, __float128 for double), and errors in ulp.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "core/math.h"

namespace tether::math_test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct DoubleMath {
  using Number = double;
  static constexpr int kSeriesTerms = 13;  // 0.25^13 / 15! < 2^-66
  static double exp(double x) { return std::exp(x); }
  static double expm1(double x) { return std::expm1(x); }
  static double log(double x) { return std::log(x); }
  static double log1p(double x) { return std::log1p(x); }
};

// A function under test: its name, stated bound, and the closed range that its values stay in.
#define TETHER_MATH_FUNCTION(function, ulp, lowest, highest)    \
  static constexpr const char* kName = #function;               \
  static constexpr double kLowest = lowest, kHighest = highest; \
  template <class T>                                            \
  static constexpr double kUlp = math::ulp<T>;                  \
  template <class T>                                            \
  TETHER_INLINE static T ours(T x) {                            \
    return math::function(x);                                   \
  }                                                             \
  template <class Math, class Number = typename Math::Number>   \
  static Number reference(Number x)

struct Exp {
  TETHER_MATH_FUNCTION(exp, kExpUlp, 0, kInfinity) { return Math::exp(x); }
};

struct Expm1 {
  TETHER_MATH_FUNCTION(expm1, kExpm1Ulp, -1, kInfinity) { return Math::expm1(x); }
};

struct Log {
  TETHER_MATH_FUNCTION(log, kLogUlp, -kInfinity, kInfinity) { return Math::log(x); }
};

struct Log1p {
  TETHER_MATH_FUNCTION(log1p, kLog1pUlp, -kInfinity, kInfinity) { return Math::log1p(x); }
};

struct Sigmoid {
  TETHER_MATH_FUNCTION(sigmoid, kSigmoidUlp, 0, 1) {
    const Number e = Math::exp(x < 0 ? x : -x);
    return (x < 0 ? e : 1) / (1 + e);
  }
};

struct LogSigmoid {
  TETHER_MATH_FUNCTION(log_sigmoid, kLogSigmoidUlp, -kInfinity, 0) {
    return x < 0 ? x - Math::log1p(Math::exp(x)) : -Math::log1p(Math::exp(-x));
  }
};

struct Log1mexp {
  TETHER_MATH_FUNCTION(log1mexp, kLog1mexpUlp, -kInfinity, 0) {
    return x < Number(-0.6875) ? Math::log1p(-Math::exp(x)) : Math::log(-Math::expm1(x));
  }
};

// Near 0 by (e^d - 1 - d) / d^2 = 1/2! + d/3! + d^2/4! + ... = (1 + d/3 (1 + d/4 (1 + ...))) / 2;
// beyond, the difference loses 4 bits of the wide type.
struct Expm1Minus {
  TETHER_MATH_FUNCTION(expm1_minus, kExpm1MinusUlp, 0, kInfinity) {
    if (x == Number(kInfinity)) return x;
    if (x <= Number(-0.25) || x >= Number(0.25) || x != x) return Math::expm1(x) - x;
    Number sum = 1;
    for (int k = Math::kSeriesTerms + 2; k >= 3; --k) sum = 1 + x / k * sum;
    return x * x * sum / 2;
  }
};

#undef TETHER_MATH_FUNCTION

using Functions = std::tuple<Exp, Expm1, Log, Log1p, Sigmoid, LogSigmoid, Log1mexp, Expm1Minus>;

inline double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
}

// |result - exact| in units of the last place of exact. The subnormals' place is the smallest
// normal number's; overflow counts as 2^128 (2^1024), so an inf is right where it is the nearest.
template <class T, class Number>
double ulp_error(T result, Number exact) {
  using Limits = std::numeric_limits<T>;
  if (exact != exact) return result != result ? 0 : kInfinity;
  if (result != result) return kInfinity;
  const Number overflow = Number(Limits::max()) * (1 + Number(Limits::epsilon()) / 2);
  const Number wanted = std::clamp(exact, -overflow, overflow);
  const Number size = std::min(wanted < 0 ? -wanted : wanted, Number(Limits::max()));
  int exponent = static_cast<int>(std::bit_cast<std::uint64_t>(double(size)) >> 52) - 1023;
  if (Number(power_of_two(std::max(exponent, -1022))) > size) --exponent;  // rounded up to double
  exponent = std::max(exponent, Limits::min_exponent - 1);
  const Number error = std::clamp(Number(result), -overflow, overflow) - wanted;
  const int half = exponent / 2;
  return double((error < 0 ? -error : error) * power_of_two(-half) * power_of_two(half - exponent) *
                power_of_two(Limits::digits - 1));
}

// Inside the closed range of the function, or NaN where the exact result is.
template <class Function, class T, class Number>
bool in_range(T result, Number exact) {
  if (exact != exact) return result != result;
  return result >= T(Function::kLowest) && result <= T(Function::kHighest);
}

}  // namespace tether::math_test
