#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/macros.h"
#include "pair_blocks.h"

// The divergences of two rows that are nearly equal, where q (log q - log p) cancels:
//
//   KL(q || p) = sum_v q (e^-d - 1 + d),  KL(p || q) = sum_v p (e^d - 1 - d),  d = log q - log p
//
// as q and p sum to 1. No term is below 0. With C = cosh d - 1 and S = sinh d - d the brackets are
// C - S and C + S: by their series for small d, where p - q + q d would cancel.

namespace tether::rows {

template <class Real>
struct NearPair {
  Plain<Real> of_q, of_p;
  Real over_sum_q, over_sum_p;  // 1 / sum
  Real shift, per_temperature;  // of the references; 1 / T
  Real offset;                  // log q - log p = ((x - y) - shift) / T + offset
};

// Up to here the series are exact to the last bits. Beyond, p - q + q d loses 5 of them (double:
// 10).
template <class Real>
inline constexpr Real kNearest = std::is_same_v<Real, double> ? Real(0.0625) : Real(0.5);

template <class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void sum_near(const Stored* q, const Stored* p, int64_t count,
                                            const NearPair<Real>& row_in, double& forward,
                                            double& reverse) {
  const NearPair<Real> row = row_in;
  Real forwards[kRowLanes] = {}, reverses[kRowLanes] = {};
  for (int64_t begin = 0; begin < count; begin += kRowLanes) {
    Real q_buffer[kRowLanes], p_buffer[kRowLanes];
    const Real* x = widened_lanes(q + begin, q_buffer);
    const Real* y = widened_lanes(p + begin, p_buffer);
#pragma GCC ivdep
    for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
      const Real a = row.of_q.power(x[i]).value * row.over_sum_q;
      const Real b = row.of_p.power(y[i]).value * row.over_sum_p;
      const Real d = ((x[i] - y[i]) - row.shift) * row.per_temperature + row.offset;
      const Real dd = d * d;
      const Real C = dd / 2 * (1 + dd / 12 * (1 + dd / 30 * (1 + dd / 56)));
      const Real S = d * dd / 6 * (1 + dd / 20 * (1 + dd / 42));
      const bool near = std::abs(d)<kNearest<Real>, there = a + b> Real(0);
      const Real of_a = near ? a * (C - S) : (b - a) + a * d;
      const Real of_b = near ? b * (C + S) : (a - b) - b * d;
      forwards[i] += or_zero(of_a, there);
      reverses[i] += or_zero(of_b, there);
    }
  }
  const auto add = [](double a, double b) { return a + b; };
  forward += reduced<double>(forwards, add);
  reverse += reduced<double>(reverses, add);
}

}  // namespace tether::rows
