#pragma once

#include <cmath>
#include <cstdint>

#include "../core/half.h"
#include "../core/macros.h"
#include "../core/math.h"
#include "../core/packed.h"
#include "../core/select.h"
#include "../core/team.h"
#include "final_logit.h"
#include "row_parts.h"
#include "rows_cuda.h"
#include "shrink.h"

// The two passes over a row of logits as programs of a team (core/team.h): rows.cu runs them on a
// device. t_v = (x_v - reference) k as in RowStatistics, with the largest x for a reference: no
// term exceeds 1, and the entropy, ln 2 (log2 sum - weighted_sum / sum), adds numbers that are not
// negative.

namespace tether::cuda {

inline constexpr float kLn2 = 0x1.62e43p-1f;
inline constexpr float kLargestFloat = 0x1.fffffep+127f;
// 2^this is 0, times anything finite.
inline constexpr float kNothing = -200;

// The sums over the columns that one thread has seen.
template <bool kAll>
struct ColumnSums {
  float reference = -kLargestFloat;
  float sum = 0, weighted_sum = 0;
  float squares = 0, logit_sum = 0, columns = 0;  // kAll

  // To a reference that is not smaller.
  TETHER_TEAM void move(float to, float k) {
    const float shift = fmaxf((reference - to) * k, kNothing);
    const float power = exp2_fast(shift);
    weighted_sum = power * fmaf(shift, sum, weighted_sum);  // sum_v 2^(t + shift) (t + shift)
    sum *= power;
    if constexpr (kAll) squares *= power * power;
    reference = to;
  }
  TETHER_TEAM void add(float x, float k) {
    const float t = max_or_nan((x - reference) * k, kNothing);
    const float power = exp2_fast(t);
    sum += power;
    weighted_sum = fmaf(power, t, weighted_sum);
    if constexpr (kAll) {
      const bool present = x != -math::detail::Format<float>::kInfinity;
      squares = fmaf(power, power, squares);
      logit_sum += present ? x : 0.0f;
      columns += present ? 1.0f : 0.0f;
    }
  }
};

// Of all columns. `local`: what each thread has, ColumnSums or more.
template <bool kAll, class Team, class Local>
TETHER_TEAM ColumnSums<kAll> merged(const Team& team, Local& local, float k) {
  using Sums = ColumnSums<kAll>;
  const float reference =
      team.template reduce<Max>(local,
                                [](const Sums& own) { return Several<float, 1>{own.reference}; })
          .each[0];
  team.each(local, [&](int, Sums& own) { own.move(reference, k); });
  const auto totals = team.template reduce<Sum>(local, [](const Sums& own) {
    if constexpr (kAll) {
      return Several<float, 5>{own.sum, own.weighted_sum, own.squares, own.logit_sum, own.columns};
    } else {
      return Several<float, 2>{own.sum, own.weighted_sum};
    }
  });
  Sums out;
  out.reference = reference;
  out.sum = totals.each[0];
  out.weighted_sum = totals.each[1];
  if constexpr (kAll) {
    out.squares = totals.each[2];
    out.logit_sum = totals.each[3];
    out.columns = totals.each[4];
  }
  return out;
}

// Vectors first, first + step ... of `count` at `body`; beyond them columns that are not there.
template <int kVectors, class Stored>
TETHER_TEAM void load_vectors(const Stored* body, int64_t first, int64_t step, int64_t count,
                              Packed<Stored>* vectors) {
  TETHER_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    const int64_t i = first + u * step;
    vectors[u] = i < count ? Packed<Stored>::at(body + i * Packed<Stored>::kCount)
                           : Packed<Stored>::minus_infinity();
  }
}

// The reference moves once for all of them.
template <int kVectors, class Stored, bool kCapped, bool kAll>
TETHER_TEAM void add_vectors(const RowParameters<kCapped>& in, const Packed<Stored>* vectors,
                             ColumnSums<kAll>& own) {
  const float k = in.k();
  float largest = -kLargestFloat;
  TETHER_UNROLL
  for (int u = 0; u < kVectors; ++u) largest = fmaxf(largest, vectors[u].largest());
  own.move(fmaxf(own.reference, in.final_logit(largest)), k);
  TETHER_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    float x[Packed<Stored>::kCount];
    vectors[u].widen(x);
    TETHER_UNROLL
    for (int i = 0; i < Packed<Stored>::kCount; ++i) own.add(in.final_logit(x[i]), k);
  }
}

// From memory, kUnroll of them on their way at a time.
template <class Stored, bool kCapped, bool kAll>
TETHER_TEAM void add_vectors_from(const RowParameters<kCapped>& in, const Stored* body,
                                  int64_t first, int64_t step, int64_t count,
                                  ColumnSums<kAll>& own) {
  for (int64_t i = first; i < count; i += step * kUnroll) {
    Packed<Stored> vectors[kUnroll];
    load_vectors<kUnroll>(body, i, step, count, vectors);
    add_vectors<kUnroll>(in, vectors, own);
  }
}

// The columns of a row that are in no vector.
template <class Stored, bool kCapped, bool kAll>
TETHER_TEAM void add_singles(const RowParameters<kCapped>& in, const RowParts<Stored>& parts,
                             const Stored* row, int64_t first, int64_t step,
                             ColumnSums<kAll>& own) {
  for (int64_t i = first; i < parts.singles; i += step) {
    const float x =
        in.final_logit(widened<float>(row[parts.column_of_single(i) * in.logits.stride]));
    own.move(fmaxf(own.reference, x), in.k());
    own.add(x, in.k());
  }
}

// One read of the row.
template <class Stored, bool kCapped, bool kAll, class Team>
TETHER_TEAM ColumnSums<kAll> sums_of_row(const Team& team, const RowParameters<kCapped>& in,
                                         const Stored* row) {
  const RowParts<Stored> parts(in.logits.vocabulary, in.logits.stride == 1, shift_of(row));
  typename Team::template Local<ColumnSums<kAll>> local;
  team.each(local, [&](int thread, ColumnSums<kAll>& own) {
    add_vectors_from(in, row + parts.head, thread, Team::kThreads, parts.vectors, own);
    add_singles(in, parts, row, thread, Team::kThreads, own);
  });
  return merged<kAll>(team, local, in.k());
}

// The column of the target, or what there is instead: none, or that of another shard; no id.
inline constexpr int64_t kNoTarget = -1, kNoId = -2;
template <bool kCapped>
TETHER_TEAM int64_t target_of(const RowParameters<kCapped>& in, int64_t row) {
  if (in.targets == nullptr) return kNoTarget;
  const int64_t id = in.targets[row], column = id - in.first_id;
  if (id < 0 || id >= in.ids) return kNoId;
  return column >= 0 && column < in.logits.vocabulary ? column : kNoTarget;
}

template <class Number>
TETHER_TEAM void put(Number* out, int64_t row, Number value) {
  if (out != nullptr) out[row] = value;
}

TETHER_TEAM float logp_of(const RowState& row, float multiplier) {
  const float logp = fmaf(row.target_logit - row.reference, multiplier, -kLn2 * log2f(row.sum));
  return logp > 0 ? 0 : logp;
}
TETHER_TEAM float entropy_of(const RowState& row) {
  const float entropy = kLn2 * (log2f(row.sum) - row.weighted_sum / row.sum);
  return entropy < 0 ? 0 : entropy;
}

// Of a row whose target, as target_of has it, has this stored logit.
template <bool kCapped, bool kAll>
TETHER_TEAM RowState state_of(const RowParameters<kCapped>& in, const ColumnSums<kAll>& sums,
                              int64_t target, float target_logit) {
  constexpr float kNaN = math::detail::Format<float>::kNaN;
  RowState state{sums.reference, sums.sum, sums.weighted_sum,
                 -math::detail::Format<float>::kInfinity};
  if (target >= 0) state.target_logit = in.final_logit(target_logit);
  if constexpr (kAll) {
    state.sum_of_squares = sums.squares;
    state.logit_sum = target == kNoId ? kNaN : sums.logit_sum;
    state.columns = sums.columns;
  }
  // 0: no column is above -inf, here.
  if (target == kNoId || (state.sum == 0 && !in.is_shard())) state.sum = kNaN;
  return state;
}

template <bool kAll>
TETHER_TEAM void put_results(const RowResults& out, int64_t row, const RowState& state,
                             float multiplier) {
  if (out.states != nullptr) out.states[row] = state;
  put(out.logps, row, logp_of(state, multiplier));
  put(out.entropies, row, entropy_of(state));
  put(out.logsumexps, row, fmaf(state.reference, multiplier, kLn2 * log2f(state.sum)));
  put(out.target_is_largest, row, state.target_logit >= state.reference && state.sum > 0);
  if constexpr (kAll) {
    put(out.sums_of_squared_p, row, state.sum_of_squares / (state.sum * state.sum));
    put(out.mean_logits, row, state.logit_sum / state.columns * multiplier);
  }
}

template <class Stored, bool kCapped, bool kAll, class Team>
TETHER_TEAM void row_statistics_program(const Team& team, const RowParameters<kCapped>& in,
                                        int64_t row, const RowResults& out) {
  typename Team::template Local<NoState> local;
  if (in.is_ignored(row)) {
    team.each(local, [&](int thread, NoState&) {
      if (thread == 0) put_results<kAll>(out, row, {0, 1, 0, 0, 1, 0, 1}, in.multiplier);
    });
    return;
  }
  const Stored* logits = row_of<Stored>(in.logits, row);
  const auto sums = sums_of_row<Stored, kCapped, kAll>(team, in, logits);
  team.each(local, [&](int thread, NoState&) {
    if (thread != 0) return;
    const int64_t target = target_of(in, row);
    const float logit = target >= 0 ? widened<float>(logits[target * in.logits.stride]) : 0;
    put_results<kAll>(out, row, state_of(in, sums, target, logit), in.multiplier);
  });
}

// Up to here the upstream gradients of a row are finite in everything that they are multiplied by:
// a multiplier of 1e12, a t and a mean of t above -200.
inline constexpr float kLargestUpstream = 0x1p60f;

// The upstream gradients of a row, and what the gradients that they give are to be multiplied by.
struct Upstream {
  static constexpr float kInfinity = math::detail::Format<float>::kInfinity;

  float dlogp, dentropy, growth;

  TETHER_TEAM Upstream(float of_logp, float of_entropy) {
    if (fmaxf(fabsf(of_logp), fabsf(of_entropy)) == kInfinity) {
      dlogp = beside_infinity(of_logp);
      dentropy = beside_infinity(of_entropy);
      growth = kInfinity;
      return;
    }
    const float shrink = fminf(rows::shrink_to(fabsf(of_logp), kLargestUpstream),
                               rows::shrink_to(fabsf(of_entropy), kLargestUpstream));
    dlogp = of_logp * shrink;
    dentropy = of_entropy * shrink;
    growth = 1 / shrink;
  }

 private:
  // What is not infinite is nothing there.
  static TETHER_TEAM float beside_infinity(float each) {
    return fabsf(each) == kInfinity ? copysignf(kLargestUpstream, each) : 0 * each;
  }
};

// What is 0 stays 0 under an infinite growth.
TETHER_TEAM float grown(float gradient, float growth) {
  return gradient == 0 ? 0 : gradient * growth;
}

// d/dx_v = growth 2^t_v (constant + slope t_v), but for the target.
struct GradientLine {
  float reference, constant, slope, growth;

  TETHER_TEAM GradientLine(const RowState& row, const Upstream& upstream, float multiplier) {
    const float weight = -multiplier / row.sum;
    const float of_entropy = upstream.dentropy * kLn2;
    const float mean = upstream.dentropy == 0 ? 0 : row.weighted_sum / row.sum;
    constant = weight * (upstream.dlogp - of_entropy * mean);
    slope = weight * of_entropy;
    growth = upstream.growth;
    // A row that is NaN has no column that is absent.
    reference = row.sum == row.sum ? row.reference : row.sum;
  }
  TETHER_TEAM float at(float x, float k) const {
    const float t = max_or_nan((x - reference) * k, kNothing);
    const float power = exp2_fast(t);
    const float gradient = power * fmaf(slope, t, constant);
    return power == 0 ? 0 : gradient;
  }
};

// At the target, whose stored logit is given.
template <bool kCapped>
TETHER_TEAM float gradient_of_target(const RowParameters<kCapped>& in, const RowState& row,
                                     const Upstream& upstream, float logit) {
  const float logp = logp_of(row, in.multiplier);
  const float p = math::exp(logp);
  float gradient = -upstream.dlogp * math::expm1(logp);
  if (upstream.dentropy != 0 && p != 0) {
    gradient -= upstream.dentropy * p * (logp + entropy_of(row));
  }
  return grown(gradient * in.slope_multiplier * in.final_logit.slope(logit), upstream.growth);
}

// Of a row: its gradient at the column of a stored logit.
template <bool kCapped>
struct RowGradient {
  GradientLine line;
  float k;
  rows::FinalLogit<float, kCapped> final_logit;

  TETHER_TEAM float operator()(float logit) const {
    return grown(line.at(final_logit(logit), k) * final_logit.slope(logit), line.growth);
  }
};

template <class Team, class Stored, class Piece>
TETHER_TEAM void clear_piece(const Team& team, const Piece& piece, Stored* out, int64_t stride) {
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    piece.for_each_vector(thread, [&](int64_t i, int) {
      if (i < piece.parts.vectors) {
        Packed<Stored>{}.store(out + piece.parts.head + i * Packed<Stored>::kCount);
      }
    });
    piece.for_each_single(thread, [&](int64_t column) { out[column * stride] = Stored{}; });
  });
}

// What a thread owns of a piece.
template <class Stored, bool kCapped, class Piece>
TETHER_TEAM void write_gradients(int thread, const Piece& piece,
                                 const RowGradient<kCapped>& gradient, const Stored* logits,
                                 int64_t stride, Stored* out, int64_t out_stride) {
  using Vector = Packed<Stored>;
  constexpr int kCount = Vector::kCount;
  Vector vectors[kUnroll];
  piece.for_each_vector(thread, [&](int64_t i, int u) {
    if (i < piece.parts.vectors) vectors[u] = Vector::at(logits + piece.parts.head + i * kCount);
  });
  piece.for_each_vector(thread, [&](int64_t i, int u) {
    if (i >= piece.parts.vectors) return;
    float x[kCount];
    vectors[u].widen(x);
    TETHER_UNROLL
    for (int j = 0; j < kCount; ++j) x[j] = gradient(x[j]);
    Vector::narrow(x).store(out + piece.parts.head + i * kCount);
  });
  piece.for_each_single(thread, [&](int64_t column) {
    out[column * out_stride] = narrowed<Stored>(gradient(widened<float>(logits[column * stride])));
  });
}

// In place, other teams may have overwritten their pieces already: a thread reads of the logits
// what it writes itself.
template <class Stored, bool kCapped, class Team>
TETHER_TEAM void row_gradient_program(const Team& team, const RowParameters<kCapped>& in,
                                      int64_t row, int piece_index, int pieces,
                                      const RowState* states, const float* dlogps,
                                      const float* dentropies, const MutableLogits& dlogits) {
  const Stored* logits = row_of<Stored>(in.logits, row);
  Stored* out = row_of<Stored>(dlogits, row);
  const int64_t stride = in.logits.stride, out_stride = dlogits.stride;
  const bool in_vectors =
      stride == 1 && out_stride == 1 && shift_of(logits) == shift_of<Stored>(out);
  const RowPiece<Team, Stored> piece{
      RowParts<Stored>(in.logits.vocabulary, in_vectors, shift_of(logits)), piece_index, pieces};
  const float dlogp = dlogps != nullptr ? dlogps[row] : 0;
  const float dentropy = dentropies != nullptr ? dentropies[row] : 0;
  if (in.is_ignored(row) || (dlogp == 0 && dentropy == 0)) {
    return clear_piece(team, piece, out, out_stride);
  }
  const RowState state = states[row];
  const Upstream upstream(dlogp, dentropy);
  const RowGradient<kCapped> gradient{GradientLine(state, upstream, in.slope_multiplier), in.k(),
                                      in.final_logit};
  const int64_t target = target_of(in, row);
  const bool has_target =
      target >= 0 && state.target_logit > -math::detail::Format<float>::kInfinity;

  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    const bool owns_target = has_target && piece.owns(thread, target);
    float of_target = 0;  // found before its logit is overwritten
    if (owns_target) {
      of_target = gradient_of_target(in, state, upstream, widened<float>(logits[target * stride]));
    }
    write_gradients(thread, piece, gradient, logits, stride, out, out_stride);
    if (owns_target) out[target * out_stride] = narrowed<Stored>(of_target);
  });
}

}  // namespace tether::cuda
