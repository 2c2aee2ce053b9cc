#pragma once

#include <cstdint>

#include "../core/bit_cast.h"
#include "pair_kl_program.h"

// Values and gradients of two rows of logits as one program: its team holds what it has read, so
// that both are read once and written once. A team is a cluster (core/cluster.h); what is more than
// its threads can hold they read again.

namespace tether::cuda {

// Of a block, so many that 8 of them hold 147456 columns of both rows in 9 vectors of each.
inline constexpr int kHeldPairVectors = 9;
template <class Stored>
inline constexpr int kHeldPairThreads = sizeof(Stored) == sizeof(float) ? 512 : 256;

// Of the cluster of a row: as few as hold it, 8 at most. The bits of a row depend on it, so that
// nothing about the call or the machine may, but for `clusters`: whether it knows any.
template <class Stored>
int blocks_of_held_pair(int64_t vocabulary, bool clusters) {
  constexpr int64_t kBlock =
      int64_t{kHeldPairThreads<Stored>} * kHeldPairVectors * Packed<Stored>::kCount;
  int blocks = 1;
  while (clusters && blocks < 8 && blocks * kBlock < vocabulary) blocks *= 2;
  return blocks;
}

// The columns that are the largest of a row, which are not among the sums of its others. `column`
// is one of them.
struct PairHighest {
  float count = 0, gap = 0;
  int64_t column = -1;
  float other = 0;  // the logit of the other row
};

// Its sums are of the columns below the largest of q, and of p. Before there are any, its
// references are the largest that the thread has.
template <class Stored>
struct HeldPair : PairSums {
  Packed<Stored> q[kHeldPairVectors], p[kHeldPairVectors];
  PairHighest highest_q, highest_p;

  TETHER_TEAM void add_with_highest(float x, float y, int64_t at, float k) {
    const PairColumn column(x, y, reference_q, reference_p, k);
    const bool is_q = x == reference_q, is_p = y == reference_p;
    // A power is 1, and NaN where the largest is infinite.
    if (is_q) highest_q = {highest_q.count + column.q_power, highest_q.gap + column.gap, at, y};
    if (is_p) highest_p = {highest_p.count + column.p_power, highest_p.gap - column.gap, at, x};
    const float q_power = is_q ? 0.0f : column.q_power, p_power = is_p ? 0.0f : column.p_power;
    sum_q += q_power;
    sum_p += p_power;
    add_weighted(column, q_power, p_power);
  }
};

template <int kCount>
struct Count {};

// visit(first column, logits of q, of p, Count) for the columns of a thread: kCount beside each
// other, those that it holds first.
template <class Stored, class Visit>
TETHER_TEAM void for_each_held(const PairRow<Stored>& row, const HeldPair<Stored>& own, int thread,
                               int64_t threads, Visit visit) {
  using Vector = Packed<Stored>;
  const auto vectors = [&](int64_t i, const Vector& of_q, const Vector& of_p) {
    float x[Vector::kCount], y[Vector::kCount];
    of_q.widen(x);
    of_p.widen(y);
    visit(row.parts.head + i * Vector::kCount, x, y, Count<Vector::kCount>{});
  };
  TETHER_UNROLL
  for (int u = 0; u < kHeldPairVectors; ++u) {
    const int64_t i = thread + u * threads;
    if (i < row.parts.vectors) vectors(i, own.q[u], own.p[u]);
  }
  for (int64_t i = thread + kHeldPairVectors * threads; i < row.parts.vectors; i += threads) {
    const int64_t column = row.parts.head + i * Vector::kCount;
    vectors(i, Vector::at(row.q + column), Vector::at(row.p + column));
  }
  for (int64_t i = thread; i < row.parts.singles; i += threads) {
    const int64_t column = row.parts.column_of_single(i);
    const float x = row.q_at(column), y = row.p_at(column);
    visit(column, &x, &y, Count<1>{});
  }
}

template <class Stored>
TETHER_TEAM void hold(const PairRow<Stored>& row, int thread, int64_t threads,
                      HeldPair<Stored>& own) {
  using Vector = Packed<Stored>;
  TETHER_UNROLL
  for (int u = 0; u < kHeldPairVectors; ++u) {
    const int64_t i = thread + u * threads, column = row.parts.head + i * Vector::kCount;
    const bool there = i < row.parts.vectors;
    own.q[u] = there ? Vector::at(row.q + column) : Vector::minus_infinity();
    own.p[u] = there ? Vector::at(row.p + column) : Vector::minus_infinity();
  }
  for_each_held(row, own, thread, threads,
                [&]<int kCount>(int64_t, const float* x, const float* y, Count<kCount>) {
                  TETHER_UNROLL
                  for (int i = 0; i < kCount; ++i) {
                    own.reference_q = fmaxf(own.reference_q, x[i]);
                    own.reference_p = fmaxf(own.reference_p, y[i]);
                  }
                });
}

// The sums of all columns, and of those below the largest.
struct HeldTotals {
  PairTotals all, others;
  float count_q, count_p;  // of the largest
};

// The thread that has the largest column of a row looks for it; all others only add.
template <class Stored, class Team, class Local>
TETHER_TEAM HeldTotals held_totals(const Team& team, Local& local, const PairRow<Stored>& row,
                                   float k) {
  using Held = HeldPair<Stored>;
  const auto largest = team.template reduce<Max>(
      local, [](const Held& own) { return Several<float, 2>{own.reference_q, own.reference_p}; });
  const float reference_q = largest.each[0], reference_p = largest.each[1];
  team.each(local, [&](int thread, Held& own) {
    const bool has_highest = own.reference_q == reference_q || own.reference_p == reference_p;
    own.reference_q = reference_q;
    own.reference_p = reference_p;
    for_each_held(row, own, thread, team.threads(),
                  [&]<int kCount>(int64_t column, const float* x, const float* y, Count<kCount>) {
                    TETHER_UNROLL
                    for (int i = 0; i < kCount; ++i) {
                      if (has_highest) {
                        own.add_with_highest(x[i], y[i], column + i, k);
                      } else {
                        own.add(x[i], y[i], k);
                      }
                    }
                  });
  });
  HeldTotals out;
  out.others = totals_of(team, local, reference_q, reference_p);
  const auto highest = team.template reduce<Sum>(local, [](const Held& own) {
    return Several<float, 4>{own.highest_q.count, own.highest_p.count, own.highest_q.gap,
                             own.highest_p.gap};
  });
  out.all = out.others;
  out.all.sum_q = sum_or_nan(out.others.sum_q + highest.each[0]);
  out.all.sum_p = sum_or_nan(out.others.sum_p + highest.each[1]);
  out.all.forward += highest.each[2];
  out.all.reverse += highest.each[3];
  out.count_q = highest.each[0];
  out.count_p = highest.each[1];
  return out;
}

// ---- gradients ----------------------------------------------------------------------------------

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
    return fmaf(mixed, a - b, a == 0 ? 0.0f : product);
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

// Where the gradients of a row go; null: not wanted.
template <class Stored>
struct PairOutput {
  Stored* row = nullptr;
  int64_t stride = 1;

  TETHER_TEAM PairOutput(const MutableLogits& to, int64_t index) {
    if (to.data == nullptr) return;
    row = row_of<Stored>(to, index);
    stride = to.stride;
  }
  TETHER_TEAM bool is_aligned(uintptr_t shift) const {
    return row == nullptr || (stride == 1 && shift_of<Stored>(row) == shift);
  }
  template <int kCount>
  TETHER_TEAM void put(int64_t column, const float* gradients) const {
    if (row == nullptr) return;
    if constexpr (kCount == 1) {
      row[column * stride] = narrowed<Stored>(gradients[0]);
    } else {
      Packed<Stored>::narrow(gradients).store(row + column);
    }
  }
};

template <class Stored>
struct PairOutputs {
  PairOutput<Stored> q, p;

  // Where both rows and both gradients are aligned alike.
  TETHER_TEAM bool in_vectors(const PairParameters& in, int64_t row) const {
    const uintptr_t shift = shift_of(row_of<Stored>(in.q, row));
    return q.is_aligned(shift) && p.is_aligned(shift);
  }
};

template <class Team, class Stored>
TETHER_TEAM void clear_pair(const Team& team, const PairRow<Stored>& row,
                            const PairOutputs<Stored>& out) {
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    constexpr int kCount = Packed<Stored>::kCount;
    const float none[kCount] = {};
    for (int64_t i = thread; i < row.parts.vectors; i += team.threads()) {
      out.q.template put<kCount>(row.parts.head + i * kCount, none);
      out.p.template put<kCount>(row.parts.head + i * kCount, none);
    }
    for (int64_t i = thread; i < row.parts.singles; i += team.threads()) {
      out.q.template put<1>(row.parts.column_of_single(i), none);
      out.p.template put<1>(row.parts.column_of_single(i), none);
    }
  });
}

template <class Stored, class Team, class Local>
TETHER_TEAM void write_pair(const Team& team, Local& local, const PairRow<Stored>& row,
                            const PairGradients& gradients, const PairOutputs<Stored>& out,
                            float k) {
  using Held = HeldPair<Stored>;
  team.each(local, [&](int thread, Held& own) {
    for_each_held(row, own, thread, team.threads(),
                  [&]<int kCount>(int64_t column, const float* x, const float* y, Count<kCount>) {
                    float of_q[kCount], of_p[kCount];
                    TETHER_UNROLL
                    for (int i = 0; i < kCount; ++i) gradients.at(x[i], y[i], k, of_q[i], of_p[i]);
                    out.q.template put<kCount>(column, of_q);
                    out.p.template put<kCount>(column, of_p);
                  });
    if (gradients.majority_q && own.highest_q.column >= 0) {
      const float of_q = gradients.at_majority_q(own.highest_q.other, k);
      out.q.template put<1>(own.highest_q.column, &of_q);
    }
    if (gradients.majority_p && own.highest_p.column >= 0) {
      const float of_p = gradients.at_majority_p(own.highest_p.other, k);
      out.p.template put<1>(own.highest_p.column, &of_p);
    }
  });
}

template <class Stored, class Team>
TETHER_TEAM void held_pair_program(const Team& team, const PairParameters& in, int64_t index,
                                   const PairKlArrays<const float>& upstreams,
                                   const PairKlArrays<float>& values, const MutableLogits& dq,
                                   const MutableLogits& dp) {
  const PairOutputs<Stored> out{{dq, index}, {dp, index}};
  const PairRow<Stored> row(in, index, out.in_vectors(in, index));
  const PairUpstream upstream(upstreams, index);
  const bool with_values =
      values.kl != nullptr || values.reverse_kl != nullptr || values.entropy != nullptr;
  typename Team::template Local<HeldPair<Stored>> local;
  const auto put = [&](const PairKl& found) {
    team.each(local, [&](int thread, HeldPair<Stored>&) {
      if (thread == 0) put_values(values, index, found);
    });
  };
  if (!in.is_active(index)) put({0, 0, 0});
  const bool is_read = in.is_active(index) && (with_values || !upstream.is_zero());
  if (!is_read) return clear_pair(team, row, out);
  const float k = in.k();
  team.each(local,
            [&](int thread, HeldPair<Stored>& own) { hold(row, thread, team.threads(), own); });
  const HeldTotals totals = held_totals(team, local, row, k);
  const PairKl found = values_of(totals.all);
  put(found);
  if (upstream.is_zero()) return clear_pair(team, row, out);
  write_pair(team, local, row, {totals, found, upstream, in.multiplier}, out, k);
}

}  // namespace tether::cuda
