#include "logits/pair_kl.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "core/check.h"
#include "core/macros.h"
#include "logits/lanes.h"
#include "logits/stored_rows.h"

namespace tether {
namespace {

using namespace rows;

template <class Real>
using Plain = Exponent<Real, false>;

// ---- blocks: kRowLanes columns at a time --------------------------------------------------------

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

template <class Stored, class Real = RealOf<Stored>>
TETHER_CLONES void largest_block(const Stored* logits, int64_t count, Real& out) {
  Real largest[kRowLanes];
  for (Real& lane : largest) lane = std::numeric_limits<Real>::lowest();
  const FinalLogit<Real, false> itself;
  for (int64_t i = 0; i < count; i += kRowLanes) max_lanes(logits + i, itself, largest);
  out = reduced<Real>(largest, [](Real a, Real b) { return a > b ? a : b; });
}

// A gradient of one of the rows, a the row's own probabilities and b the other's:
//   size (a_v (constant + gap * (t_v - u_v) + own * t_v) + mixed (a_v - b_v))
// size is a power of two that makes the factors so large that no product with a probability is
// subnormal; a gradient below `least` before it is multiplied is 0.
template <class Real>
struct PairSlope {
  Real constant, gap, own, mixed, size, least;

  static PairSlope of(double constant, double gap, double own, double mixed) {
    constexpr double kSmallest = Exp2<Real>::kLeast / 2, kLargeFactor = 12;
    const double all = std::abs(constant) + std::abs(gap) + std::abs(own) + std::abs(mixed);
    const double power = std::max(std::floor(std::log2(all)) - kLargeFactor, kSmallest);
    const double size = std::isfinite(all) ? std::exp2(power) : 1;
    const auto real = [](double number) { return static_cast<Real>(number); };
    return {real(constant / size), real(gap / size), real(own / size),
            real(mixed / size),    real(size),       std::numeric_limits<Real>::min() / real(size)};
  }
};

template <class Real>
TETHER_INLINE Real pair_gradient(const PairSlope<Real>& slope, Real a, Real b, Real gap, Real t) {
  const Real product = a * (slope.constant + slope.gap * gap + slope.own * t);
  const Real gradient = or_zero(product, a != Real(0)) + slope.mixed * (a - b);
  return or_zero(gradient, !(std::abs(gradient) < slope.least)) * slope.size;
}

template <class Real>
struct PairGradient {
  Plain<Real> of_q, of_p;
  Real over_sum_q, over_sum_p;  // 1 / sum
  PairSlope<Real> dq, dp;
};

template <bool kQ, bool kP, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void gradient_pair(const Stored* q, const Stored* p, const PairGradient<Real>& row,
                                 Stored* dq, Stored* dp) {
  Real q_buffer[kRowLanes], p_buffer[kRowLanes], dq_buffer[kRowLanes], dp_buffer[kRowLanes];
  const Real* x = widened_lanes(q, q_buffer);
  const Real* y = widened_lanes(p, p_buffer);
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const auto [t, q_power] = row.of_q.power(x[i]);
    const auto [u, p_power] = row.of_p.power(y[i]);
    const Real a = q_power * row.over_sum_q, b = p_power * row.over_sum_p;
    const Real gap = far_exponent(row.of_q, x[i]) - far_exponent(row.of_p, y[i]);
    if constexpr (kQ) dq_buffer[i] = pair_gradient(row.dq, a, b, gap, t);
    if constexpr (kP) dp_buffer[i] = pair_gradient(row.dp, b, a, gap, u);
  }
  constexpr bool kSame = std::is_same_v<Stored, Real>;
  if constexpr (kQ && kSame) std::copy_n(dq_buffer, kRowLanes, dq);
  if constexpr (kP && kSame) std::copy_n(dp_buffer, kRowLanes, dp);
  if constexpr (kQ && !kSame) narrow_lanes(dq_buffer, dq);
  if constexpr (kP && !kSame) narrow_lanes(dp_buffer, dp);
}

template <bool kQ, bool kP, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void gradient_pairs(const Stored* q, const Stored* p, int64_t count,
                                                  const PairGradient<Real>& row_in, Stored* dq,
                                                  Stored* dp) {
  const auto row = row_in;
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(q + i);
    prefetch_ahead(p + i);
    gradient_pair<kQ, kP>(q + i, p + i, row, dq + i, dp + i);
  }
}

// ---- rows ---------------------------------------------------------------------------------------

// So far above the subnormal numbers that differences of two 2^t and products are normal as well.
template <class Real>
inline constexpr Real kLeastExponent = Exp2<Real>::kLeast + Real(24);

template <class Real>
Plain<Real> exponent(double reference, double temperature) {
  return {.reference = static_cast<Real>(reference),
          .scale = static_cast<Real>(std::numbers::log2e / temperature),
          .least = kLeastExponent<Real>};
}

template <class Stored, class Real = RealOf<Stored>>
KlStatistics statistics_of_pair(const Stored* q, int64_t q_stride, const Stored* p,
                                int64_t p_stride, int64_t vocabulary, double temperature) {
  KlStatistics row;
  auto of_q = exponent<Real>(0, temperature), of_p = of_q;
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> x(q, q_stride, begin, vocabulary), y(p, p_stride, begin, vocabulary);
    if (begin == 0) {
      largest_block(x.logits, kRowLanes, of_q.reference);
      largest_block(y.logits, kRowLanes, of_p.reference);
    }
    auto sums = sums_of_pair(x, y, of_q, of_p);
    const bool q_exceeds = sums.highest_q > kLargestExponent<Real>;
    const bool p_exceeds = sums.highest_p > kLargestExponent<Real>;
    if (q_exceeds) largest_block(x.logits, x.padded, of_q.reference);
    if (p_exceeds) largest_block(y.logits, y.padded, of_p.reference);
    if (q_exceeds || p_exceeds) sums = sums_of_pair(x, y, of_q, of_p);
    row = merge(row,
                {of_q.reference, sums.sum_q, of_p.reference, sums.sum_p, sums.forward, sums.reverse,
                 sums.weighted_sum, sums.alone_q, sums.alone_p},
                temperature);
  }
  return row;
}

// log q_v - log p_v = ln 2 (t_v - u_v) + this.
double log_offset(const KlStatistics& row) { return std::log(row.sum_p) - std::log(row.sum_q); }

template <class Real>
PairGradient<Real> gradient_of_pair(const KlStatistics& row, const LogitsKl& upstream,
                                    double temperature) {
  const double k = 1 / temperature, ln2 = std::numbers::ln2;
  const LogitsKl value = logits_kl(row);
  const double offset = log_offset(row);
  // What is not asked for may be infinite, which has no gradient.
  const auto times = [k](double factor, double what) {
    if (factor == 0) return 0.0;
    return std::isinf(what) ? std::numeric_limits<double>::quiet_NaN() : k * factor * what;
  };
  // The least probability instead of the least 2^t.
  const auto exponent_of = [=](double reference, double sum) {
    auto of = exponent<Real>(reference, temperature);
    of.least += std::max(Real(0), static_cast<Real>(std::log2(sum)));
    return of;
  };
  return {
      .of_q = exponent_of(row.reference_q, row.sum_q),
      .of_p = exponent_of(row.reference_p, row.sum_p),
      .over_sum_q = static_cast<Real>(1 / row.sum_q),
      .over_sum_p = static_cast<Real>(1 / row.sum_p),
      .dq = PairSlope<Real>::of(times(upstream.kl, offset - value.kl) -
                                    times(upstream.entropy, value.entropy - std::log(row.sum_q)),
                                times(upstream.kl, ln2), -times(upstream.entropy, ln2),
                                times(upstream.reverse_kl, 1)),
      .dp = PairSlope<Real>::of(times(upstream.reverse_kl, -offset - value.reverse_kl),
                                -times(upstream.reverse_kl, ln2), 0, times(upstream.kl, 1))};
}

template <bool kQ, bool kP, class Stored, class Real = RealOf<Stored>>
void write_gradients(const Stored* q, int64_t q_stride, const Stored* p, int64_t p_stride,
                     int64_t vocabulary, const PairGradient<Real>& row, Stored* dq,
                     int64_t dq_stride, Stored* dp, int64_t dp_stride) {
  Stored q_buffer[kRowBlock], p_buffer[kRowBlock];
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> x(q, q_stride, begin, vocabulary), y(p, p_stride, begin, vocabulary);
    gradient_pairs<kQ, kP>(x.logits, y.logits, x.padded, row, q_buffer, p_buffer);
    for (int64_t i = 0; kQ && i < x.count; ++i) dq[(begin + i) * dq_stride] = q_buffer[i];
    for (int64_t i = 0; kP && i < y.count; ++i) dp[(begin + i) * dp_stride] = p_buffer[i];
  }
}

// ---- all rows -----------------------------------------------------------------------------------

void check_pair(const std::string& function, const ConstLogits& q, const ConstLogits& p,
                double temperature) {
  check_range(function, "temperature", temperature, Range{1e-6, 1e6});
  require(q.dtype == p.dtype && q.rows == p.rows && q.vocabulary == p.vocabulary, [&] {
    return function + ": p must be [" + text(q.rows) + ", " + text(q.vocabulary) +
           "] of the type of q, got [" + text(p.rows) + ", " + text(p.vocabulary) + "]" +
           (q.dtype == p.dtype ? "" : " of another type");
  });
  require(q.vocabulary >= 1, [&] {
    return function + ": q must have a vocabulary of at least 1, got " + text(q.vocabulary);
  });
}

// sum_v 2^t_v (t_v - u_v) after the references have moved by `shift_t` and `shift_u`.
double moved(double sum_of_gaps, double sum, double shift_t, double shift_u) {
  return (sum_of_gaps + sum * (shift_t - shift_u)) * std::exp2(shift_t);
}

KlStatistics rescaled(const KlStatistics& row, double reference_q, double reference_p,
                      double scale) {
  constexpr double kFarthest = -1e290;  // 2^this is 0, times any sum of logits
  const double shift_q = std::max(kFarthest, (row.reference_q - reference_q) * scale);
  const double shift_p = std::max(kFarthest, (row.reference_p - reference_p) * scale);
  if (shift_q == 0 && shift_p == 0) return row;
  return {reference_q,
          row.sum_q * std::exp2(shift_q),
          reference_p,
          row.sum_p * std::exp2(shift_p),
          moved(row.forward, row.sum_q, shift_q, shift_p),
          moved(row.reverse, row.sum_p, shift_p, shift_q),
          (row.weighted_sum + row.sum_q * shift_q) * std::exp2(shift_q),
          row.alone_q * std::exp2(shift_q),
          row.alone_p * std::exp2(shift_p)};
}

// sum_of_gaps, infinite where the other row has nothing beside a probability.
double with_alone(double sum_of_gaps, double alone, double sum) {
  constexpr double kLeastProbability = 0x1p-100;
  return alone > kLeastProbability * sum ? infinity : sum_of_gaps;
}

}  // namespace

KlStatistics merge(const KlStatistics& a, const KlStatistics& b, double temperature) {
  const double scale = std::numbers::log2e / temperature;
  const double q = std::max(a.reference_q, b.reference_q);
  const double p = std::max(a.reference_p, b.reference_p);
  const KlStatistics x = rescaled(a, q, p, scale), y = rescaled(b, q, p, scale);
  return {q,
          x.sum_q + y.sum_q,
          p,
          x.sum_p + y.sum_p,
          x.forward + y.forward,
          x.reverse + y.reverse,
          x.weighted_sum + y.weighted_sum,
          std::max(x.alone_q, y.alone_q),
          std::max(x.alone_p, y.alone_p)};
}

LogitsKl logits_kl(const KlStatistics& row) {
  const double ln2 = std::numbers::ln2, offset = log_offset(row);
  const double forward = with_alone(row.forward, row.alone_q, row.sum_q);
  const double reverse = with_alone(row.reverse, row.alone_p, row.sum_p);
  return {std::max(ln2 * forward / row.sum_q + offset, 0.0),
          std::max(ln2 * reverse / row.sum_p - offset, 0.0),
          std::max(std::log(row.sum_q) - ln2 * row.weighted_sum / row.sum_q, 0.0)};
}

void logits_kl_statistics(const ConstLogits& q, const ConstLogits& p, double temperature,
                          const uint8_t* active, KlStatistics* statistics,
                          const Executor& executor) {
  // Two equal rows of one column.
  constexpr KlStatistics kInactive{.reference_q = 0, .sum_q = 1, .reference_p = 0, .sum_p = 1};
  check_pair("logits_kl_statistics", q, p, temperature);
  with_stored_type("logits_kl_statistics", "q", q.dtype, [&]<class Stored>(Stored) {
    for_each_row(q, executor, [&](int64_t row) {
      const bool skipped = active != nullptr && active[row] == 0;
      statistics[row] =
          skipped ? kInactive
                  : statistics_of_pair(row_of<Stored>(q, row), q.stride, row_of<Stored>(p, row),
                                       p.stride, q.vocabulary, temperature);
    });
  });
}

void logits_kl_gradients(const ConstLogits& q, const ConstLogits& p, double temperature,
                         const KlStatistics* statistics, const LogitsKl* upstream,
                         const MutableLogits& dq, const MutableLogits& dp,
                         const Executor& executor) {
  check_pair("logits_kl_gradients", q, p, temperature);
  const bool with_q = dq.data != nullptr, with_p = dp.data != nullptr;
  with_stored_type("logits_kl_gradients", "q", q.dtype, [&]<class Stored>(Stored) {
    const auto fill_zero = [&](const MutableLogits& out, int64_t row) {
      if (out.data == nullptr) return;
      Stored* data = row_of<Stored>(out, row);
      for (int64_t i = 0; i < q.vocabulary; ++i) data[i * out.stride] = Stored{};
    };
    for_each_row(q, executor, [&](int64_t row) {
      const LogitsKl& factors = upstream[row];
      if (factors.kl == 0 && factors.reverse_kl == 0 && factors.entropy == 0) {
        fill_zero(dq, row);
        return fill_zero(dp, row);
      }
      const auto gradient = gradient_of_pair<RealOf<Stored>>(statistics[row], factors, temperature);
      const auto write = [&]<bool kQ, bool kP>(std::bool_constant<kQ>, std::bool_constant<kP>) {
        write_gradients<kQ, kP>(row_of<Stored>(q, row), q.stride, row_of<Stored>(p, row), p.stride,
                                q.vocabulary, gradient, kQ ? row_of<Stored>(dq, row) : nullptr,
                                dq.stride, kP ? row_of<Stored>(dp, row) : nullptr, dp.stride);
      };
      constexpr std::true_type kYes;
      constexpr std::false_type kNo;
      if (with_q && with_p) {
        write(kYes, kYes);
      } else if (with_q) {
        write(kYes, kNo);
      } else if (with_p) {
        write(kNo, kYes);
      }
    });
  });
}

}  // namespace tether
