#pragma once

#include <cstdint>

#include "pair_gradients.h"
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
struct PairBelow : PairSums {
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

template <class Stored>
struct HeldPair : PairBelow {
  Packed<Stored> q[kHeldPairVectors], p[kHeldPairVectors];
};

template <int kCount>
struct Count {};

// visit(first column, logits of q, of p, Count) for the columns of a vector.
template <class Stored, class Visit>
TETHER_TEAM void visit_vectors(const PairRow<Stored>& row, int64_t i, const Packed<Stored>& of_q,
                               const Packed<Stored>& of_p, Visit visit) {
  constexpr int kCount = Packed<Stored>::kCount;
  float x[kCount], y[kCount];
  of_q.widen(x);
  of_p.widen(y);
  visit(row.parts.head + i * kCount, x, y, Count<kCount>{});
}

// For those of a thread, vectors from its `first` on: kCount beside each other.
template <class Stored, class Visit>
TETHER_TEAM void for_each_read(const PairRow<Stored>& row, int64_t first, int thread,
                               int64_t threads, Visit visit) {
  using Vector = Packed<Stored>;
  for (int64_t i = first; i < row.parts.vectors; i += threads) {
    const int64_t column = row.parts.head + i * Vector::kCount;
    visit_vectors(row, i, Vector::at(row.q + column), Vector::at(row.p + column), visit);
  }
  for (int64_t i = thread; i < row.parts.singles; i += threads) {
    const int64_t column = row.parts.column_of_single(i);
    const float x = row.q_at(column), y = row.p_at(column);
    visit(column, &x, &y, Count<1>{});
  }
}

// Those that it holds first.
template <class Stored, class Visit>
TETHER_TEAM void for_each_held(const PairRow<Stored>& row, const HeldPair<Stored>& own, int thread,
                               int64_t threads, Visit visit) {
  TETHER_UNROLL
  for (int u = 0; u < kHeldPairVectors; ++u) {
    const int64_t i = thread + u * threads;
    if (i < row.parts.vectors) visit_vectors(row, i, own.q[u], own.p[u], visit);
  }
  for_each_read(row, thread + kHeldPairVectors * threads, thread, threads, visit);
}

// Of what for_each_held goes through.
template <class Row, class Own>
TETHER_TEAM void find_references(const Row& row, Own& own, int thread, int64_t threads) {
  for_each_held(row, own, thread, threads,
                [&]<int kCount>(int64_t, const float* x, const float* y, Count<kCount>) {
                  TETHER_UNROLL
                  for (int i = 0; i < kCount; ++i) {
                    own.reference_q = fmaxf(own.reference_q, x[i]);
                    own.reference_p = fmaxf(own.reference_p, y[i]);
                  }
                });
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
  find_references(row, own, thread, threads);
}

// The thread that has the largest column of a row looks for it; all others only add. `row`: what
// for_each_held goes through.
template <class Team, class Local, class Row>
TETHER_TEAM HeldTotals held_totals(const Team& team, Local& local, const Row& row, float k) {
  const auto largest = team.template reduce<Max>(local, [](const PairBelow& own) {
    return Several<float, 2>{own.reference_q, own.reference_p};
  });
  const float reference_q = largest.each[0], reference_p = largest.each[1];
  team.each(local, [&](int thread, auto& own) {
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
  const auto highest = team.template reduce<Sum>(local, [](const PairBelow& own) {
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

template <class Stored, class Team, class Local, class Row>
TETHER_TEAM void write_pair(const Team& team, Local& local, const Row& row,
                            const PairGradients& gradients, const PairOutputs<Stored>& out,
                            float k) {
  team.each(local, [&](int thread, auto& own) {
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
  typename Team::template Local<HeldPair<Stored>> local;
  const auto put = [&](const PairKl& found) {
    team.each(local, [&](int thread, HeldPair<Stored>&) {
      if (thread == 0) put_values(values, index, found);
    });
  };
  if (!in.is_active(index)) put({0, 0, 0});
  const bool is_read = in.is_active(index) && (has_any(values) || !upstream.is_zero());
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
