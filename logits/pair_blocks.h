#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../core/macros.h"
#include "lanes.h"

// The passes over a block of two rows.

namespace tether::rows {

template <class Real>
using Plain = Exponent<Real, false>;

// ---- sums: kRowLanes columns at a time ----------------------------------------------------------

template <class Real>
struct PairLanes {
  Real highest_q[kRowLanes], highest_p[kRowLanes];
  Real sum_q[kRowLanes], sum_p[kRowLanes];
  Real forward[kRowLanes], reverse[kRowLanes], weighted_sum[kRowLanes];
  Real alone_q[kRowLanes], alone_p[kRowLanes];
};

template <class Real>
struct PairSums {
  Real highest_q, highest_p, alone_q, alone_p;
  double sum_q, sum_p, forward, reverse, weighted_sum;
};

// Exponents below this count as this: a difference of two, times a probability, stays finite.
template <class Real>
inline constexpr Real kFarthest = std::is_same_v<Real, double> ? Real(-0x1p960) : Real(-0x1p112);

// t of a logit however far below, up to kFarthest.
template <class Real>
TETHER_INLINE Real far_exponent(const Plain<Real>& of, Real x) {
  const Real t = (x - of.reference) * of.scale;
  return t < kFarthest<Real> ? kFarthest<Real> : t;
}

// kAlone: some columns are at -inf in one row alone, or too far apart for Real. Otherwise such a
// column makes `forward` or `reverse` infinite.
template <bool kAlone, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void add_pair(const Stored* q, const Stored* p, const Plain<Real>& of_q,
                            const Plain<Real>& of_p, PairLanes<Real>& lanes) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real q_buffer[kRowLanes], p_buffer[kRowLanes];
  const Real* x = widened_lanes(q, q_buffer);
  const Real* y = widened_lanes(p, p_buffer);
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const auto [t, q_power] = of_q.power(x[i]);
    const auto [u, p_power] = of_p.power(y[i]);
    lanes.highest_q[i] = t > lanes.highest_q[i] ? t : lanes.highest_q[i];
    lanes.highest_p[i] = u > lanes.highest_p[i] ? u : lanes.highest_p[i];
    lanes.sum_q[i] += q_power;
    lanes.sum_p[i] += p_power;
    lanes.weighted_sum[i] += q_power * t;
    if constexpr (kAlone) {
      const Real gap = far_exponent(of_q, x[i]) - far_exponent(of_p, y[i]);
      const bool with_q = x[i] > -kInfinity, with_p = y[i] > -kInfinity;
      const Real alone_q = or_zero(q_power, !with_p), alone_p = or_zero(p_power, !with_q);
      lanes.forward[i] += or_zero(q_power * gap, with_p);
      lanes.reverse[i] -= or_zero(p_power * gap, with_q);
      lanes.alone_q[i] = alone_q > lanes.alone_q[i] ? alone_q : lanes.alone_q[i];
      lanes.alone_p[i] = alone_p > lanes.alone_p[i] ? alone_p : lanes.alone_p[i];
    } else {
      const Real gap = (x[i] - of_q.reference) * of_q.scale - (y[i] - of_p.reference) * of_p.scale;
      lanes.forward[i] += or_zero(q_power * gap, q_power != Real(0));
      lanes.reverse[i] -= or_zero(p_power * gap, p_power != Real(0));
    }
  }
}

template <bool kAlone, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void sum_pairs(const Stored* q, const Stored* p, int64_t count,
                                             const Plain<Real>& of_q_in, const Plain<Real>& of_p_in,
                                             PairSums<Real>& out) {
  const auto of_q = of_q_in, of_p = of_p_in;
  PairLanes<Real> lanes;
  for (int i = 0; i < kRowLanes; ++i) {
    lanes.highest_q[i] = lanes.highest_p[i] = -std::numeric_limits<Real>::infinity();
    lanes.sum_q[i] = lanes.sum_p[i] = lanes.forward[i] = lanes.reverse[i] = Real(0);
    lanes.weighted_sum[i] = lanes.alone_q[i] = lanes.alone_p[i] = Real(0);
  }
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(q + i);
    prefetch_ahead(p + i);
    add_pair<kAlone>(q + i, p + i, of_q, of_p, lanes);
  }
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](Real a, Real b) { return a > b ? a : b; };
  out.highest_q = reduced<Real>(lanes.highest_q, larger);
  out.highest_p = reduced<Real>(lanes.highest_p, larger);
  out.alone_q = reduced<Real>(lanes.alone_q, larger);
  out.alone_p = reduced<Real>(lanes.alone_p, larger);
  out.sum_q = reduced<double>(lanes.sum_q, add);
  out.sum_p = reduced<double>(lanes.sum_p, add);
  out.forward = reduced<double>(lanes.forward, add);
  out.reverse = reduced<double>(lanes.reverse, add);
  out.weighted_sum = reduced<double>(lanes.weighted_sum, add);
}

template <class Stored, class Real = RealOf<Stored>>
PairSums<Real> sums_of_pair(const Block<Stored>& q, const Block<Stored>& p, const Plain<Real>& of_q,
                            const Plain<Real>& of_p) {
  PairSums<Real> out;
  sum_pairs<false>(q.logits, p.logits, q.padded, of_q, of_p, out);
  if (!std::isfinite(out.forward) || !std::isfinite(out.reverse)) {
    sum_pairs<true>(q.logits, p.logits, q.padded, of_q, of_p, out);
  }
  return out;
}

// A gradient of one of the rows, a the row's own probabilities and b the other's:
//   size (a_v (constant + gap * (t_v - u_v) + own * t_v) + mixed (a_v - b_v))
// size is a power of two that makes the factors so large that no product with a probability is
// subnormal; a gradient below `least` before it is multiplied is 0. Factors count as no more than
// what keeps the sum of the terms finite; a size of infinity leaves a gradient of 0 as it is.
template <class Real>
struct PairSlope {
  Real constant, gap, own, mixed, size, least;

  static PairSlope of(double constant, double gap, double own, double mixed) {
    constexpr double kHighest = -Exp2<Real>::kLeast, kSmallest = -kHighest / 2, kLargeFactor = 12;
    const double all = std::abs(constant) + std::abs(gap) + std::abs(own) + std::abs(mixed);
    const double power = std::floor(std::log2(all)) - kLargeFactor;
    const double size = std::isnan(all) ? 1 : std::exp2(std::clamp(power, kSmallest, kHighest));
    const auto real = [size](double factor, double most) {
      return static_cast<Real>(std::clamp(factor / size, -most, most));
    };
    const double most = std::exp2(kHighest - 2);
    return {.constant = real(constant, most),
            .gap = real(gap, most / double{-kFarthest<Real> / 2}),
            .own = real(own, most / kHighest),
            .mixed = real(mixed, most),
            .size = static_cast<Real>(size),
            .least = static_cast<Real>(std::numeric_limits<Real>::min() / size)};
  }
};

// others: adds what is multiplied by size, of all columns but one with more than half of its row.
template <bool kGuarded, class Real>
TETHER_INLINE Real pair_gradient(const PairSlope<Real>& slope, Real a, Real b, Real gap, Real t,
                                 Real& others) {
  const Real product = a * (slope.constant + slope.gap * gap + slope.own * t);
  const Real gradient = or_zero(product, a != Real(0)) + slope.mixed * (a - b);
  if constexpr (kGuarded) others += or_zero(gradient, !(a > Real(0.5)));
  return or_zero(gradient * slope.size, !(std::abs(gradient) < slope.least));
}

template <class Real>
struct PairGradient {
  Plain<Real> of_q, of_p;
  Real over_sum_q, over_sum_p;  // 1 / sum
  PairSlope<Real> dq, dp;
};

// The same of the pair (p, q).
template <class Real>
PairGradient<Real> swapped(const PairGradient<Real>& row) {
  PairGradient<Real> out = {row.of_p, row.of_q, row.over_sum_p, row.over_sum_q, row.dp, row.dq};
  out.dq.gap = -out.dq.gap;
  out.dp.gap = -out.dp.gap;
  return out;
}

// What a pass makes: the gradients of q, those of p too. kGuarded: of rows with a column that has
// more than half of one, the sums of the others; of rows with columns at -inf in one alone, no gap
// there.
template <bool both, bool guarded>
struct PairPass {
  static constexpr bool kBoth = both, kGuarded = guarded;
};

template <class Pass, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void gradient_pair(const Stored* q, const Stored* p, const PairGradient<Real>& row,
                                 Stored* dq, Stored* dp, Real* q_others, Real* p_others) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real q_buffer[kRowLanes], p_buffer[kRowLanes], dq_buffer[kRowLanes], dp_buffer[kRowLanes];
  const Real* x = widened_lanes(q, q_buffer);
  const Real* y = widened_lanes(p, p_buffer);
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const auto [t, q_power] = row.of_q.power(x[i]);
    const auto [u, p_power] = row.of_p.power(y[i]);
    const Real a = q_power * row.over_sum_q, b = p_power * row.over_sum_p;
    Real gap = far_exponent(row.of_q, x[i]) - far_exponent(row.of_p, y[i]);
    if constexpr (Pass::kGuarded) gap = or_zero(gap, (x[i] > -kInfinity) & (y[i] > -kInfinity));
    dq_buffer[i] = pair_gradient<Pass::kGuarded>(row.dq, a, b, gap, t, q_others[i]);
    if constexpr (Pass::kBoth) {
      dp_buffer[i] = pair_gradient<Pass::kGuarded>(row.dp, b, a, gap, u, p_others[i]);
    }
  }
  const auto store = [](const Real* gradients, Stored* to) {
    if constexpr (std::is_same_v<Stored, Real>) {
      std::copy_n(gradients, kRowLanes, to);
    } else {
      narrow_lanes(gradients, to);
    }
  };
  store(dq_buffer, dq);
  if constexpr (Pass::kBoth) store(dp_buffer, dp);
}

template <class Pass, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void gradient_pairs(const Stored* q, const Stored* p, int64_t count,
                                                  const PairGradient<Real>& row_in, Stored* dq,
                                                  Stored* dp, double& q_others, double& p_others) {
  const auto row = row_in;
  Real q_lanes[kRowLanes], p_lanes[kRowLanes];
  for (int i = 0; i < kRowLanes; ++i) q_lanes[i] = p_lanes[i] = Real(0);
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(q + i);
    prefetch_ahead(p + i);
    gradient_pair<Pass>(q + i, p + i, row, dq + i, dp + i, q_lanes, p_lanes);
  }
  if constexpr (!Pass::kGuarded) return;
  const auto add = [](double a, double b) { return a + b; };
  q_others += reduced<double>(q_lanes, add);
  p_others += reduced<double>(p_lanes, add);
}

}  // namespace tether::rows
