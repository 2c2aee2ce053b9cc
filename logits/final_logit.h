#pragma once

#include <cmath>
#include <limits>

#include "../core/macros.h"
#include "../core/math.h"
#include "../core/select.h"
#include "statistics.h"

// The final logit of a stored one, in the words of RowStatistics: itself or, where there is a cap,
// softcap tanh(scale logit / softcap). An infinite logit stays there.

namespace tether::rows {

inline bool is_capped(const RowOptions& options) { return options.softcap > 0; }

// Of x / T with respect to the final logit.
inline double multiplier(const RowOptions& options) {
  return (is_capped(options) ? 1 : options.scale) / options.temperature;
}

// Of a double or a tensor, where there is a cap.
template <class Number>
Number capped(const Number& logit, const RowOptions& options) {
  using std::tanh;
  return tanh(logit * options.scale / options.softcap) * options.softcap;
}
// Its derivative: 1 - tanh^2 = 4 q / (1 + q)^2, q = e^(-2 |z|), which keeps its digits.
template <class Number>
Number capped_slope(const Number& logit, const RowOptions& options) {
  using std::abs, std::exp;
  const Number q = exp(-2 * abs(logit * options.scale / options.softcap));
  return 4 * q / ((1 + q) * (1 + q)) * options.scale;
}

inline double final_logit(double logit, const RowOptions& options) {
  return is_capped(options) && std::abs(logit) < infinity ? capped(logit, options) : logit;
}
inline double final_slope(double logit, const RowOptions& options) {
  return is_capped(options) ? capped_slope(logit, options) : 1;
}

// The same for loops, which leave the scale of the slope to outer_slope.
inline double outer_slope(const RowOptions& options) {
  return is_capped(options) ? options.scale : 1;
}
template <class Real, bool kCapped>
struct FinalLogit {
  Real inner = 1;  // scale / softcap
  Real cap = 1;    // softcap

  static FinalLogit of(const RowOptions& options) {
    if constexpr (!kCapped) return {};
    constexpr double kLargest = double{std::numeric_limits<Real>::max()} / 4;
    return {static_cast<Real>(tether::bounded(options.scale / options.softcap, kLargest)),
            static_cast<Real>(options.softcap)};
  }

  TETHER_INLINE Real operator()(Real logit) const {
    if constexpr (!kCapped) return logit;
    constexpr Real kInfinity = math::detail::Format<Real>::kInfinity;
    return (logit < Real(0) ? -logit : logit) < kInfinity ? cap * tanh(logit) : logit;
  }
  TETHER_INLINE Real slope(Real logit) const {
    if constexpr (!kCapped) return Real(1);
    const Real z = inner * logit;
    const Real q = math::exp(Real(-2) * (z < Real(0) ? -z : z));
    const Real sum = Real(1) + q;
    return Real(4) * q / (sum * sum);
  }

 private:
  TETHER_INLINE Real tanh(Real logit) const {
    const Real e = math::expm1(Real(2) * inner * logit, Real(40));
    return e / (e + Real(2));
  }
};

}  // namespace tether::rows
