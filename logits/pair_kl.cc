#include "logits/pair_kl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>

#include "core/check.h"
#include "logits/lanes.h"
#include "logits/near_pair.h"
#include "logits/pair_blocks.h"
#include "logits/row_blocks.h"
#include "logits/stored_rows.h"

namespace tether {
namespace {

using namespace rows;

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

// The largest of `count` logits; finite if there is none.
template <class Stored, class Real = RealOf<Stored>>
Real reference_of(const Block<Stored>& block, int64_t count) {
  Real largest;
  largest_block(block.logits, count, FinalLogit<Real, false>{}, largest);
  return std::max(largest, std::numeric_limits<Real>::lowest());
}

// That of the highest t of a block, no lower than the reference, which is one of the row.
template <class Real>
double logit_at(const Plain<Real>& of, Real highest) {
  return highest > 0 ? of.reference + highest / of.scale : of.reference;
}

// log q_v - log p_v = ln 2 (t_v - u_v) + this.
double log_offset(const KlStatistics& row) { return std::log(row.sum_p) - std::log(row.sum_q); }

// Of rows so near that rounding is a part of the divergence: its sums, as if nothing had been lost.
template <class Stored, class Real = RealOf<Stored>>
KlStatistics refined(const KlStatistics& row, const Stored* q, int64_t q_stride, const Stored* p,
                     int64_t p_stride, int64_t vocabulary, double temperature) {
  constexpr double kNear = 0x1p13 * std::numeric_limits<Real>::epsilon();
  const LogitsKl value = logits_kl(row);
  const bool near = value.kl < kNear && value.reverse_kl < kNear;
  if (!near || row.alone_q > 0 || row.alone_p > 0) return row;
  const double offset = log_offset(row);
  const NearPair<Real> pair = {.of_q = exponent<Real>(row.reference_q, temperature),
                               .of_p = exponent<Real>(row.reference_p, temperature),
                               .over_sum_q = static_cast<Real>(1 / row.sum_q),
                               .over_sum_p = static_cast<Real>(1 / row.sum_p),
                               .shift = static_cast<Real>(row.reference_q - row.reference_p),
                               .per_temperature = static_cast<Real>(1 / temperature),
                               .offset = static_cast<Real>(offset)};
  double forward = 0, reverse = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> x(q, q_stride, begin, vocabulary), y(p, p_stride, begin, vocabulary);
    sum_near(x.logits, y.logits, x.padded, pair, forward, reverse);
  }
  KlStatistics out = row;
  out.forward = (forward - offset) * row.sum_q / std::numbers::ln2;
  out.reverse = (reverse + offset) * row.sum_p / std::numbers::ln2;
  return std::isfinite(forward + reverse) ? out : row;
}

template <class Stored, class Real = RealOf<Stored>>
KlStatistics statistics_of_pair(const Stored* q, int64_t q_stride, const Stored* p,
                                int64_t p_stride, int64_t vocabulary, double temperature) {
  KlStatistics row, highest;
  auto of_q = exponent<Real>(0, temperature), of_p = of_q;
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> x(q, q_stride, begin, vocabulary), y(p, p_stride, begin, vocabulary);
    if (begin == 0) {
      of_q.reference = reference_of(x, kRowLanes);
      of_p.reference = reference_of(y, kRowLanes);
    }
    auto sums = sums_of_pair(x, y, of_q, of_p);
    const bool q_exceeds = sums.highest_q > kLargestExponent<Real>;
    const bool p_exceeds = sums.highest_p > kLargestExponent<Real>;
    if (q_exceeds) of_q.reference = reference_of(x, x.padded);
    if (p_exceeds) of_p.reference = reference_of(y, y.padded);
    if (q_exceeds || p_exceeds) sums = sums_of_pair(x, y, of_q, of_p);
    const KlStatistics part = {of_q.reference,    sums.sum_q,   of_p.reference,
                               sums.sum_p,        sums.forward, sums.reverse,
                               sums.weighted_sum, sums.alone_q, sums.alone_p};
    row = begin == 0 ? part : merge(row, part, temperature);
    highest.reference_q = std::max(highest.reference_q, logit_at(of_q, sums.highest_q));
    highest.reference_p = std::max(highest.reference_p, logit_at(of_p, sums.highest_p));
  }
  row = merge(row, highest, temperature);
  return refined(row, q, q_stride, p, p_stride, vocabulary, temperature);
}

bool is_infinite(const LogitsKl& upstream) {
  return std::isinf(upstream.kl) || std::isinf(upstream.reverse_kl) || std::isinf(upstream.entropy);
}

// Beside infinite gradients, what is not is nothing: the signs of those.
LogitsKl signs_of_infinite(const LogitsKl& upstream) {
  const auto sign = [](double each) {
    return std::isinf(each) ? std::copysign(1, each) : 0 * each;
  };
  return {sign(upstream.kl), sign(upstream.reverse_kl), sign(upstream.entropy)};
}

template <class Real>
PairGradient<Real> gradient_of_pair(const KlStatistics& row, const LogitsKl& upstream_in,
                                    double temperature) {
  const bool infinite = is_infinite(upstream_in);
  const LogitsKl upstream = infinite ? signs_of_infinite(upstream_in) : upstream_in;
  const double k = 1 / temperature, ln2 = std::numbers::ln2;
  const LogitsKl value = logits_kl(row);
  const double offset = log_offset(row);
  // What is not asked for may be infinite, which has no gradient.
  const auto times = [k](double factor, double what) {
    const auto bounded = [](double product) { return std::clamp(product, -1e300, 1e300); };
    if (factor == 0) return 0.0;
    if (std::isinf(what)) return std::numeric_limits<double>::quiet_NaN();
    return bounded(bounded(k * factor) * what);
  };
  // The least probability instead of the least 2^t.
  const auto exponent_of = [=](double reference, double sum) {
    auto of = exponent<Real>(reference, temperature);
    of.least += std::max(Real(0), static_cast<Real>(std::log2(sum)));
    return of;
  };
  PairGradient<Real> out = {
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
  if (infinite) out.dq.size = out.dp.size = std::numeric_limits<Real>::infinity();
  return out;
}

// A column with more than this part of its row outweighs all others together, by more than the
// rounding of the part. What it adds to its own gradient cancels; the gradients of a row sum to 0.
constexpr double kMajority = 0.625;

// `sum` is that of 2^t with the largest t at 0.
bool has_majority(double sum) { return 1 > kMajority * sum; }

bool has_lone_columns(const KlStatistics& row) { return row.alone_q > 0 || row.alone_p > 0; }

// Where the gradients of one row go.
template <class Stored>
struct PairOutput {
  static constexpr int64_t kNowhere = -1;

  Stored* row;
  int64_t stride;
  double others = 0;            // sum, as gradient_pairs leaves it
  int64_t majority = kNowhere;  // its column

  void write(const Stored* gradients, int64_t begin, int64_t count) const {
    if (stride == 1) {
      std::copy_n(gradients, count, row + begin);
      return;
    }
    for (int64_t i = 0; i < count; ++i) row[(begin + i) * stride] = gradients[i];
  }
  // Looks for the majority in a block, whose logits are about to be overwritten.
  template <class Real>
  void look_for_majority(const Block<Stored>& block, int64_t begin, const Plain<Real>& of,
                         Real over_sum) {
    if (majority != kNowhere || !(over_sum > Real(kMajority))) return;
    Real largest;
    largest_block(block.logits, block.padded, FinalLogit<Real, false>{}, largest);
    const bool found = of.power(largest).value * over_sum > Real(kMajority);
    if (found) majority = begin + column_of(block, largest);
  }
  // After the last block. Where there are no others it is 0, but for a divergence without slopes.
  template <class Real>
  void write_majority(const PairSlope<Real>& slope) const {
    if (majority == kNowhere) return;
    const double sum = others == 0 ? double{0 * slope.constant} : others * slope.size;
    row[majority * stride] = narrowed<Stored>(flushed(static_cast<Real>(-sum)));
  }
};

template <class Pass, class Stored, class Real = RealOf<Stored>>
void write_gradients(const Stored* q, int64_t q_stride, const Stored* p, int64_t p_stride,
                     int64_t vocabulary, const PairGradient<Real>& row, PairOutput<Stored> dq,
                     PairOutput<Stored> dp) {
  Stored q_buffer[kRowBlock], p_buffer[kRowBlock];
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> x(q, q_stride, begin, vocabulary), y(p, p_stride, begin, vocabulary);
    gradient_pairs<Pass>(x.logits, y.logits, x.padded, row, q_buffer, p_buffer, dq.others,
                         dp.others);
    constexpr bool kOfBoth = Pass::kBoth && Pass::kGuarded;
    if constexpr (Pass::kGuarded) dq.look_for_majority(x, begin, row.of_q, row.over_sum_q);
    if constexpr (kOfBoth) dp.look_for_majority(y, begin, row.of_p, row.over_sum_p);
    dq.write(q_buffer, begin, x.count);
    if constexpr (Pass::kBoth) dp.write(p_buffer, begin, y.count);
  }
  dq.write_majority(row.dq);
  if constexpr (Pass::kBoth) dp.write_majority(row.dp);
}

// ---- all rows -----------------------------------------------------------------------------------

// sum_v 2^t_v (t_v - u_v) after the reference of t has moved by `shift`, and gaps by `gap`.
double moved(double sum_of_gaps, double sum, double shift, double gap) {
  return (sum_of_gaps + sum * gap) * std::exp2(shift);
}

KlStatistics rescaled(const KlStatistics& row, double reference_q, double reference_p,
                      double scale) {
  constexpr double kFarthest = -1e290;  // 2^this is 0, times any sum of logits
  const double shift_q = std::max(kFarthest, (row.reference_q - reference_q) * scale);
  const double shift_p = std::max(kFarthest, (row.reference_p - reference_p) * scale);
  if (shift_q == 0 && shift_p == 0) return row;
  // Where one row has had no column yet, those of the other have no gaps that could move.
  const double gap = row.sum_q == 0 || row.sum_p == 0 ? 0 : shift_q - shift_p;
  return {reference_q,
          row.sum_q * std::exp2(shift_q),
          reference_p,
          row.sum_p * std::exp2(shift_p),
          moved(row.forward, row.sum_q, shift_q, gap),
          moved(row.reverse, row.sum_p, shift_p, -gap),
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

namespace rows {

void check_pair(std::string_view name, const ConstLogits& q, const ConstLogits& p,
                double temperature) {
  const std::string function(name);
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

}  // namespace rows

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
    for_each_row(q, executor, [&](int64_t row) {
      const KlStatistics& sums = statistics[row];
      const LogitsKl& factors = upstream[row];
      if (factors.kl == 0 && factors.reverse_kl == 0 && factors.entropy == 0) {
        if (with_q) fill_zero(row_of<Stored>(dq, row), q.vocabulary, dq.stride);
        if (with_p) fill_zero(row_of<Stored>(dp, row), p.vocabulary, dp.stride);
        return;
      }
      const auto gradient = gradient_of_pair<RealOf<Stored>>(sums, factors, temperature);
      const Stored* of_q = row_of<Stored>(q, row);
      const Stored* of_p = row_of<Stored>(p, row);
      const PairOutput<Stored> to_q = {with_q ? row_of<Stored>(dq, row) : nullptr, dq.stride};
      const PairOutput<Stored> to_p = {with_p ? row_of<Stored>(dp, row) : nullptr, dp.stride};
      const auto write_with = [&]<bool kGuarded>(std::bool_constant<kGuarded>) {
        using Both = PairPass<true, kGuarded>;
        using One = PairPass<false, kGuarded>;
        if (with_q && with_p) {
          write_gradients<Both>(of_q, q.stride, of_p, p.stride, q.vocabulary, gradient, to_q, to_p);
        } else if (with_q) {
          write_gradients<One>(of_q, q.stride, of_p, p.stride, q.vocabulary, gradient, to_q, to_p);
        } else if (with_p) {
          write_gradients<One>(of_p, p.stride, of_q, q.stride, q.vocabulary, swapped(gradient),
                               to_p, to_q);
        }
      };
      if (has_majority(sums.sum_q) || has_majority(sums.sum_p) || has_lone_columns(sums)) {
        write_with(std::true_type{});
      } else {
        write_with(std::false_type{});
      }
    });
  });
}

}  // namespace tether
