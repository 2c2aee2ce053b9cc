#pragma once

#include <cmath>
#include <cstdint>

#include "../core/half.h"
#include "../core/macros.h"
#include "../core/math.h"
#include "../core/packed.h"
#include "../core/select.h"
#include "../core/team.h"
#include "pair_kl_cuda.h"
#include "row_parts.h"

// The sums over two rows of logits (pair_kl.h) as a program of a team: pair_kl.cu runs it on a
// device. t = (x - reference) k of q, u = (y - reference) k of p, each below its row's largest.

namespace tether::cuda {

inline constexpr int kPairThreads = 512, kPairUnroll = 2;

struct PairParameters {
  ConstLogits q, p;
  const uint8_t* active;  // or null
  float multiplier;       // 1 / T

  TETHER_TEAM float k() const { return multiplier * kLog2E; }
  TETHER_TEAM bool is_active(int64_t row) const { return active == nullptr || active[row] != 0; }
};

inline PairParameters pair_parameters(const ConstLogits& q, const ConstLogits& p,
                                      double temperature, const uint8_t* active) {
  return {q, p, active, static_cast<float>(1 / temperature)};
}

namespace pairs {

inline constexpr float kLn2 = 0x1.62e43p-1f;
inline constexpr float kInfinity = math::detail::Format<float>::kInfinity;
inline constexpr float kLowest = -0x1.fffffep+127f;
// Exponents below this count as this: a difference of two, times a probability, stays finite.
inline constexpr float kFarthest = -0x1p112f;

TETHER_TEAM float exponent(float x, float reference, float k) {
  return max_or_nan((x - reference) * k, kFarthest);
}

}  // namespace pairs

// A column of both rows.
struct PairColumn {
  float t, u, q_power, p_power;
  float gap;  // t - u; 0 where one of them is not there
  bool with_q, with_p;

  TETHER_TEAM PairColumn(float x, float y, float reference_q, float reference_p, float k)
      : t(pairs::exponent(x, reference_q, k)),
        u(pairs::exponent(y, reference_p, k)),
        q_power(exp2_fast(t)),
        p_power(exp2_fast(u)),
        gap(t - u),
        with_q(x > -pairs::kInfinity),
        with_p(y > -pairs::kInfinity) {
    if (!with_q || !with_p) gap = 0;
  }
};

// What one thread has seen, in the words of KlStatistics.
struct PairSums {
  float reference_q = pairs::kLowest, reference_p = pairs::kLowest;
  float sum_q = 0, sum_p = 0, forward = 0, reverse = 0, weighted_sum = 0;
  float alone_q = 0, alone_p = 0;

  TETHER_TEAM void add(float x, float y, float k) {
    const PairColumn column(x, y, reference_q, reference_p, k);
    sum_q += column.q_power;
    sum_p += column.p_power;
    add_weighted(column, column.q_power, column.p_power);
  }
  TETHER_TEAM void add_weighted(const PairColumn& column, float q_power, float p_power) {
    weighted_sum = fmaf(q_power, column.t, weighted_sum);
    forward = fmaf(q_power, column.gap, forward);
    reverse = fmaf(p_power, -column.gap, reverse);
    alone_q = fmaxf(alone_q, column.with_p ? 0.0f : column.q_power);
    alone_p = fmaxf(alone_p, column.with_q ? 0.0f : column.p_power);
  }
  // To references that are not smaller. Where one row has had no column yet, those of the other
  // have no gaps that could move.
  TETHER_TEAM void move(float to_q, float to_p, float k) {
    const float shift_q = fmaxf((reference_q - to_q) * k, pairs::kFarthest);
    const float shift_p = fmaxf((reference_p - to_p) * k, pairs::kFarthest);
    const float q = exp2_fast(shift_q), p = exp2_fast(shift_p);
    const bool with_q = sum_q != 0 || reference_q != pairs::kLowest;
    const bool with_p = sum_p != 0 || reference_p != pairs::kLowest;
    const float shift = with_q && with_p ? shift_q - shift_p : 0;
    forward = q * fmaf(sum_q, shift, forward);
    reverse = p * fmaf(sum_p, -shift, reverse);
    weighted_sum = q * fmaf(sum_q, shift_q, weighted_sum);
    sum_q *= q;
    sum_p *= p;
    alone_q *= q;
    alone_p *= p;
    reference_q = to_q;
    reference_p = to_p;
  }
};

// Of all columns.
struct PairTotals {
  float reference_q, reference_p;
  float sum_q, sum_p, forward, reverse, weighted_sum;
  float alone_q, alone_p;
};

struct PairKl {
  float kl, reverse_kl, entropy;
};

// log q_v - log p_v = ln 2 (t_v - u_v) + this.
TETHER_TEAM float log_offset(const PairTotals& row) {
  return pairs::kLn2 * log2f(row.sum_p / row.sum_q);
}

TETHER_TEAM PairKl values_of(const PairTotals& row) {
  constexpr float kLeastProbability = 0x1p-100f;
  const float offset = log_offset(row);
  const auto not_negative = [](float x) { return x < 0 ? 0 : x; };
  const auto divergence = [&](float gaps, float sum, float alone, float from) {
    if (alone > kLeastProbability * sum) return pairs::kInfinity + offset * 0;
    return not_negative(fmaf(pairs::kLn2, gaps / sum, from));
  };
  return {divergence(row.forward, row.sum_q, row.alone_q, offset),
          divergence(row.reverse, row.sum_p, row.alone_p, -offset),
          not_negative(pairs::kLn2 * (log2f(row.sum_q) - row.weighted_sum / row.sum_q))};
}

// 0: no column is above -inf.
TETHER_TEAM float sum_or_nan(float sum) {
  return sum == 0 ? math::detail::Format<float>::kNaN : sum;
}

// The references are the same in all threads. What they have is added in double.
template <class Team, class Local>
TETHER_TEAM PairTotals totals_of(const Team& team, Local& local, float reference_q,
                                 float reference_p) {
  const auto sums = team.template reduce<Sum>(local, [](const PairSums& own) {
    return Several<double, 5>{own.sum_q, own.sum_p, own.forward, own.reverse, own.weighted_sum};
  });
  const auto alone = team.template reduce<Max>(
      local, [](const PairSums& own) { return Several<float, 2>{own.alone_q, own.alone_p}; });
  return {reference_q,
          reference_p,
          static_cast<float>(sums.each[0]),
          static_cast<float>(sums.each[1]),
          static_cast<float>(sums.each[2]),
          static_cast<float>(sums.each[3]),
          static_cast<float>(sums.each[4]),
          alone.each[0],
          alone.each[1]};
}

template <class Stored>
struct PairRow {
  const Stored *q, *p;
  int64_t q_stride, p_stride;
  RowParts<Stored> parts;

  // `in_vectors`: where it is written to, rows are aligned as they are here.
  TETHER_TEAM PairRow(const PairParameters& in, int64_t row, bool in_vectors)
      : q(row_of<Stored>(in.q, row)),
        p(row_of<Stored>(in.p, row)),
        q_stride(in.q.stride),
        p_stride(in.p.stride),
        parts(in.q.vocabulary,
              in_vectors && q_stride == 1 && p_stride == 1 && shift_of(q) == shift_of(p),
              shift_of(q)) {}

  TETHER_TEAM float q_at(int64_t column) const { return widened<float>(q[column * q_stride]); }
  TETHER_TEAM float p_at(int64_t column) const { return widened<float>(p[column * p_stride]); }
};

// kPairUnroll vectors of each row are on their way at a time; the references move once for all.
template <class Stored>
TETHER_TEAM void add_vectors(const PairRow<Stored>& row, int64_t first, int64_t step, float k,
                             PairSums& own) {
  using Vector = Packed<Stored>;
  Vector q[kPairUnroll], p[kPairUnroll];
  float largest_q = pairs::kLowest, largest_p = pairs::kLowest;
  TETHER_UNROLL
  for (int u = 0; u < kPairUnroll; ++u) {
    const int64_t i = first + u * step;
    const bool there = i < row.parts.vectors;
    const int64_t column = row.parts.head + i * Vector::kCount;
    q[u] = there ? Vector::at(row.q + column) : Vector::minus_infinity();
    p[u] = there ? Vector::at(row.p + column) : Vector::minus_infinity();
  }
  TETHER_UNROLL
  for (int u = 0; u < kPairUnroll; ++u) {
    largest_q = fmaxf(largest_q, q[u].largest());
    largest_p = fmaxf(largest_p, p[u].largest());
  }
  own.move(fmaxf(own.reference_q, largest_q), fmaxf(own.reference_p, largest_p), k);
  TETHER_UNROLL
  for (int u = 0; u < kPairUnroll; ++u) {
    float x[Vector::kCount], y[Vector::kCount];
    q[u].widen(x);
    p[u].widen(y);
    TETHER_UNROLL
    for (int i = 0; i < Vector::kCount; ++i) own.add(x[i], y[i], k);
  }
}

template <class Stored, class Team>
TETHER_TEAM PairTotals pair_totals(const Team& team, const PairParameters& in, int64_t index) {
  const PairRow<Stored> row(in, index, true);
  const float k = in.k();
  typename Team::template Local<PairSums> local;
  team.each(local, [&](int thread, PairSums& own) {
    for (int64_t i = thread; i < row.parts.vectors; i += Team::kThreads * kPairUnroll) {
      add_vectors(row, i, Team::kThreads, k, own);
    }
    for (int64_t i = thread; i < row.parts.singles; i += Team::kThreads) {
      const int64_t column = row.parts.column_of_single(i);
      const float x = row.q_at(column), y = row.p_at(column);
      own.move(fmaxf(own.reference_q, x), fmaxf(own.reference_p, y), k);
      own.add(x, y, k);
    }
  });
  const auto references = team.template reduce<Max>(local, [](const PairSums& own) {
    return Several<float, 2>{own.reference_q, own.reference_p};
  });
  const float reference_q = references.each[0], reference_p = references.each[1];
  team.each(local, [&](int, PairSums& own) { own.move(reference_q, reference_p, k); });
  PairTotals out = totals_of(team, local, reference_q, reference_p);
  out.sum_q = sum_or_nan(out.sum_q);
  out.sum_p = sum_or_nan(out.sum_p);
  return out;
}

TETHER_TEAM bool has_any(const PairKlArrays<float>& out) {
  return out.kl != nullptr || out.reverse_kl != nullptr || out.entropy != nullptr;
}
TETHER_TEAM void put_values(const PairKlArrays<float>& out, int64_t row, const PairKl& values) {
  if (out.kl != nullptr) out.kl[row] = values.kl;
  if (out.reverse_kl != nullptr) out.reverse_kl[row] = values.reverse_kl;
  if (out.entropy != nullptr) out.entropy[row] = values.entropy;
}

template <class Stored, class Team>
TETHER_TEAM void pair_kl_program(const Team& team, const PairParameters& in, int64_t row,
                                 const PairKlArrays<float>& out) {
  PairKl values{0, 0, 0};
  if (in.is_active(row)) values = values_of(pair_totals<Stored>(team, in, row));
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread == 0) put_values(out, row, values);
  });
}

}  // namespace tether::cuda
