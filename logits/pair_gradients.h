#pragma once

#include <cmath>
#include <cstdint>

#include "../core/bit_cast.h"
#include "../core/select.h"
#include "pair_kl_program.h"

// The gradients of the divergences of two rows (pair_kl.h) at a column, for the programs that write
// them.

namespace tether::cuda {

// The sums of all columns, and of those below the largest.
struct HeldTotals {
  PairTotals all, others;
  float count_q, count_p;  // of the largest
};

// A gradient of one of the rows, a the row's own probabilities and b the other's, as PairSlope of
// pair_blocks.h:
//   size (a_v (constant + gap * (t_v - u_v) + own * t_v) + mixed (a_v - b_v))
// size is a power of two: no factor overflows beside the largest gap.
struct HeldSlope {
  float constant, gap, own, mixed, size;

  static TETHER_TEAM HeldSlope of(double constant, double gap, double own, double mixed) {
    constexpr double kLargeFactor = 0x1p12;
    const double all = fabs(constant) + fabs(gap) + fabs(own) + fabs(mixed);
    // The power of two below `all`, over kLargeFactor; a float.
    const double power = bit_cast<double>(bit_cast<uint64_t>(all) & 0x7FF0000000000000u);
    double size = power / kLargeFactor;
    size = size < 0x1p-63 ? 0x1p-63 : size > 0x1p126 ? 0x1p126 : size;
    if (all != all) size = 1;
    const auto real = [size](double factor, double most) {
      return static_cast<float>(bounded(factor / size, most));
    };
    return {real(constant, 0x1p124), real(gap, 0x1p13), real(own, 0x1p13), real(mixed, 0x1p124),
            static_cast<float>(size)};
  }

  // Over size.
  TETHER_TEAM float at(float a, float b, float gap_of_column, float t) const {
    const float product = a * fmaf(gap, gap_of_column, fmaf(own, t, constant));
    return fmaf(mixed, a - b, a < 0x1p-102f ? 0.0f : product);
  }
  // Below the smallest normal number it is 0; what is 0 stays it under a size of infinity.
  TETHER_TEAM float sized(float gradient) const {
    const float out = gradient * size;
    const bool none = gradient == 0 || fabsf(out) < math::detail::Format<float>::kLeastNormal;
    return none ? 0.0f : out;
  }
};

// Beside infinite gradients, what is not is nothing: these are then the signs of those.
struct PairUpstream {
  float kl, reverse_kl, entropy;
  bool infinite;

  TETHER_TEAM PairUpstream(const PairKlArrays<const float>& from, int64_t row)
      : kl(at(from.kl, row)),
        reverse_kl(at(from.reverse_kl, row)),
        entropy(at(from.entropy, row)),
        infinite(is_infinite(kl) || is_infinite(reverse_kl) || is_infinite(entropy)) {
    if (!infinite) return;
    kl = sign(kl);
    reverse_kl = sign(reverse_kl);
    entropy = sign(entropy);
  }
  TETHER_TEAM bool is_zero() const { return kl == 0 && reverse_kl == 0 && entropy == 0; }

 private:
  static TETHER_TEAM bool is_infinite(float x) { return fabsf(x) == pairs::kInfinity; }
  static TETHER_TEAM float sign(float x) { return is_infinite(x) ? (x > 0 ? 1.0f : -1.0f) : 0 * x; }
  static TETHER_TEAM float at(const float* numbers, int64_t row) {
    return numbers == nullptr ? 0 : numbers[row];
  }
};

// What one column has more than this part of outweighs all others of its row together: what it adds
// to its own gradient cancels; the gradients of a row sum to 0.
inline constexpr float kMajority = 0.625f;

struct PairGradients {
  HeldSlope dq, dp;
  HeldTotals totals;
  float over_sum_q, over_sum_p;
  bool majority_q, majority_p;

  TETHER_TEAM PairGradients(const HeldTotals& from, const PairKl& value,
                            const PairUpstream& upstream, double k)
      : totals(from) {
    const double ln2 = pairs::kLn2, offset = log_offset(totals.all);
    // What is not asked for may be infinite, which has no gradient.
    const auto times = [k](double factor, double what) {
      if (factor == 0) return 0.0;
      return what - what == 0 ? k * factor * what : double{math::detail::Format<float>::kNaN};
    };
    const double kl = upstream.kl, reverse_kl = upstream.reverse_kl, entropy = upstream.entropy;
    const double log_sum_q = ln2 * static_cast<double>(log2f(from.all.sum_q));
    dq = HeldSlope::of(times(kl, offset - value.kl) - times(entropy, value.entropy - log_sum_q),
                       times(kl, ln2), -times(entropy, ln2), times(reverse_kl, 1));
    dp = HeldSlope::of(times(reverse_kl, -offset - value.reverse_kl), -times(reverse_kl, ln2), 0,
                       times(kl, 1));
    if (upstream.infinite) dq.size = dp.size = pairs::kInfinity;
    over_sum_q = 1 / from.all.sum_q;
    over_sum_p = 1 / from.all.sum_p;
    majority_q = from.count_q == 1 && kMajority * from.all.sum_q < 1;
    majority_p = from.count_p == 1 && kMajority * from.all.sum_p < 1;
  }

  TETHER_TEAM void at(float x, float y, float k, float& of_q, float& of_p) const {
    const PairColumn column(x, y, totals.all.reference_q, totals.all.reference_p, k);
    const float a = column.q_power * over_sum_q, b = column.p_power * over_sum_p;
    of_q = dq.sized(dq.at(a, b, column.gap, column.t));
    of_p = dp.sized(dp.at(b, a, column.gap, column.u));
  }

  // Of the column that has the majority of q; y: its logit in p.
  TETHER_TEAM float at_majority_q(float y, float k) const {
    const PairTotals& others = totals.others;
    const float of_p = exp2_fast(pairs::exponent(y, others.reference_p, k)) * over_sum_p;
    const bool both = majority_p && y == others.reference_p;
    const float rest = both ? others.sum_p * over_sum_p : 1 - of_p;
    return from_others(dq, others.sum_q, others.forward, others.weighted_sum, over_sum_q, rest);
  }
  // x: the logit in q of the column that has the majority of p.
  TETHER_TEAM float at_majority_p(float x, float k) const {
    const PairTotals& others = totals.others;
    const float of_q = exp2_fast(pairs::exponent(x, others.reference_q, k)) * over_sum_q;
    const bool both = majority_q && x == others.reference_q;
    const float rest = both ? others.sum_q * over_sum_q : 1 - of_q;
    return from_others(dp, others.sum_p, -others.reverse, 0, over_sum_p, rest);
  }

 private:
  // `rest`: the probability that the other row gives the others. With `gaps` the sum of t - u.
  static TETHER_TEAM float from_others(const HeldSlope& slope, float sum, float gaps,
                                       float weighted_sum, float over_sum, float rest) {
    const float own = sum * over_sum;
    const float all = fmaf(slope.constant, own,
                           fmaf(slope.gap, gaps * over_sum, slope.own * (weighted_sum * over_sum)));
    return slope.sized(-fmaf(slope.mixed, own - rest, all));
  }
};

}  // namespace tether::cuda
