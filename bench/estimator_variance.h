#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <string_view>
#include <vector>

#include "core/number.h"
#include "estimators/kl/exact.h"
#include "estimators/kl/forms.h"

// Bias and standard deviation of the one-sample estimators of KL(q || p), q = N(0, 1) and
// p = N(shift, 1), by sampling, beside what they are exactly. Schulman 2020,
// joschu.net/blog/kl-approx.html, has the table for shifts of 0.1 and 1.

namespace tether::bench {

inline constexpr std::array<std::string_view, 4> kEstimators{"k1", "k2", "k3", "k_lambda"};

// In units of the exact divergence.
struct Accuracy {
  double bias = 0;
  double std = 0;
};

// A measured accuracy, and the standard errors of both numbers.
struct Measured {
  Accuracy value;
  Accuracy error;
};

// With s = shift^2, d = log p - log q ~ N(-s / 2, s) under q and KL = s / 2:
//   k1        variance s
//   k2        mean s / 2 + s^2 / 8, variance s^2 / 2 + s^3 / 4
//   k3        variance e^s - 1 - s
//   k_lambda  lambda* = s / (e^s - 1), variance s - s^2 / (e^s - 1)
inline double best_lambda(double shift) { return shift * shift / std::expm1(shift * shift); }

inline double exact_kl(double shift) { return gaussian_kl(0.0, 0.0, shift, 0.0); }

inline std::array<Accuracy, 4> exact(double shift) {
  const double s = shift * shift, kl = exact_kl(shift);
  const auto over_kl = [&](double bias, double variance) {
    return Accuracy{bias / kl, std::sqrt(variance) / kl};
  };
  return {over_kl(0, s), over_kl(s * s / 8, s * s / 2 + s * s * s / 4),
          over_kl(0, math::expm1_minus(s)), over_kl(0, s - s * best_lambda(shift))};
}

// A stream of N(0, 1) that depends on the seed alone (std::normal_distribution is the library's).
class Normal {
 public:
  explicit Normal(uint64_t seed) : generator_(seed) {}

  // Box and Muller 1958.
  double operator()() {
    if (spare_ready_) {
      spare_ready_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    const double angle = 2 * std::numbers::pi * uniform();
    spare_ = radius * std::sin(angle);
    spare_ready_ = true;
    return radius * std::cos(angle);
  }

 private:
  double uniform() { return static_cast<double>(generator_() >> 11) * 0x1p-53; }

  std::mt19937_64 generator_;
  double spare_ = 0;
  bool spare_ready_ = false;
};

// Sums of powers of the distance from a number near the mean.
class PowerSums {
 public:
  explicit PowerSums(double centre) : centre_(centre) {}

  void add(double value) {
    const double x = value - centre_, square = x * x;
    ++count_;
    sums_[0] += x;
    sums_[1] += square;
    sums_[2] += square * x;
    sums_[3] += square * square;
  }

  // The standard error of a standard deviation is std sqrt((kurtosis - 1) / (4 n)).
  Measured over(double kl) const {
    const double n = static_cast<double>(count_);
    const double m1 = sums_[0] / n, m2 = sums_[1] / n, m3 = sums_[2] / n, m4 = sums_[3] / n;
    const double variance = (m2 - m1 * m1) * n / (n - 1);
    const double fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1 * m1 * m1 * m1;
    const double kurtosis = fourth / (variance * variance), std = std::sqrt(variance);
    return {{(centre_ + m1 - kl) / kl, std / kl},
            {std / std::sqrt(n) / kl, std * std::sqrt((kurtosis - 1) / (4 * n)) / kl}};
  }

 private:
  double centre_;
  int64_t count_ = 0;
  std::array<double, 4> sums_{};
};

inline std::array<Measured, 4> measure(double shift, int64_t samples, uint64_t seed) {
  const double kl = exact_kl(shift), lambda = best_lambda(shift);
  std::array<PowerSums, 4> sums{PowerSums(kl), PowerSums(kl), PowerSums(kl), PowerSums(kl)};
  Normal normal(seed);
  for (int64_t i = 0; i < samples; ++i) {
    const Constant<double> d{shift * normal() - shift * shift / 2};
    sums[0].add(k1(d).value);
    sums[1].add(k2(d).value);
    sums[2].add(k3(d).value);
    sums[3].add(k_lambda(d, lambda).value);
  }
  return {sums[0].over(kl), sums[1].over(kl), sums[2].over(kl), sums[3].over(kl)};
}

}  // namespace tether::bench
