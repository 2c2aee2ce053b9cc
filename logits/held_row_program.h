#pragma once

#include <cstdint>

#include "row_program.h"

// The two passes over a row of logits as one program: its team holds what it has read, so that the
// gradient, written over the logits or elsewhere, costs one read and one write of the row. A team
// is a cluster (core/cluster.h); what is more than its threads can hold they read again.

namespace tether::cuda {

inline constexpr int kHeldThreads = 256;  // of a block

// 16 bytes each, of a thread: of float32 twice as many, so that a cluster holds as long a row. The
// arithmetic of a cap leaves few registers.
template <class Stored, bool kCapped>
inline constexpr int kHeldVectors = kCapped                           ? 4
                                    : sizeof(Stored) == sizeof(float) ? 20
                                                                      : 10;

// Of the cluster of a row: as few as hold it, 8 at most. The bits of a row depend on it, so that
// nothing about the call or the machine may, but for `clusters`: whether it knows any.
template <class Stored, bool kCapped>
int blocks_of_held_row(int64_t vocabulary, bool clusters) {
  constexpr int64_t kBlock =
      int64_t{kHeldThreads} * kHeldVectors<Stored, kCapped> * Packed<Stored>::kCount;
  int blocks = 1;
  while (clusters && blocks < 8 && blocks * kBlock < vocabulary) blocks *= 2;
  return blocks;
}

// What a thread has of its row: vectors thread, thread + threads ...
template <class Stored, int kHeld>
struct HeldColumns : ColumnSums<false> {
  Packed<Stored> vectors[kHeld];
};

// d loss / d logp and d loss / d entropy of a row.
struct RowUpstream {
  float dlogp, dentropy;
};

// A row of logits and of its gradient in memory.
template <class Stored>
struct RowMemory {
  const Stored* logits;
  Stored* out;
  int64_t stride, out_stride;
  RowParts<Stored> parts;

  TETHER_TEAM RowMemory(const ConstLogits& from, const MutableLogits& to, int64_t row)
      : logits(row_of<Stored>(from, row)),
        out(row_of<Stored>(to, row)),
        stride(from.stride),
        out_stride(to.stride),
        parts(from.vocabulary,
              stride == 1 && out_stride == 1 && shift_of(logits) == shift_of<Stored>(out),
              shift_of(logits)) {}

  TETHER_TEAM bool owns(int thread, int threads, int64_t column) const {
    const int64_t in_body = column - parts.head;
    const int64_t body = parts.vectors * Packed<Stored>::kCount;
    if (in_body >= 0 && in_body < body) {
      return in_body / Packed<Stored>::kCount % threads == thread;
    }
    return (column < parts.head ? column : column - body) % threads == thread;
  }
};

template <class Team, class Stored>
TETHER_TEAM void clear_row(const Team& team, const RowMemory<Stored>& row) {
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    Stored* body = row.out + row.parts.head;
    for (int64_t i = thread; i < row.parts.vectors; i += team.threads()) {
      Packed<Stored>{}.store(body + i * Packed<Stored>::kCount);
    }
    for (int64_t i = thread; i < row.parts.singles; i += team.threads()) {
      row.out[row.parts.column_of_single(i) * row.out_stride] = Stored{};
    }
  });
}

// The gradients of vectors first, first + step ... of `count`, to `out`.
template <int kVectors, class Stored, bool kCapped>
TETHER_TEAM void store_gradients(const RowGradient<kCapped>& gradient,
                                 const Packed<Stored>* vectors, int64_t first, int64_t step,
                                 int64_t count, Stored* out) {
  TETHER_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    const int64_t i = first + u * step;
    if (i >= count) continue;
    float x[Packed<Stored>::kCount];
    vectors[u].widen(x);
    TETHER_UNROLL
    for (int j = 0; j < Packed<Stored>::kCount; ++j) x[j] = gradient(x[j]);
    Packed<Stored>::narrow(x).store(out + i * Packed<Stored>::kCount);
  }
}

// All that a thread has, but for the target.
template <class Stored, bool kCapped, int kHeld>
TETHER_TEAM void store_columns(const RowMemory<Stored>& row, const RowGradient<kCapped>& gradient,
                               const HeldColumns<Stored, kHeld>& own, int thread, int threads) {
  const RowParts<Stored>& parts = row.parts;
  Stored* body = row.out + parts.head;
  store_gradients<kHeld>(gradient, own.vectors, thread, threads, parts.vectors, body);
  const int64_t step = threads;
  for (int64_t i = kHeld * step + thread; i < parts.vectors; i += step * kUnroll) {
    Packed<Stored> vectors[kUnroll];
    load_vectors<kUnroll>(row.logits + parts.head, i, step, parts.vectors, vectors);
    store_gradients<kUnroll>(gradient, vectors, i, step, parts.vectors, body);
  }
  for (int64_t i = thread; i < parts.singles; i += step) {
    const int64_t column = parts.column_of_single(i);
    row.out[column * row.out_stride] =
        narrowed<Stored>(gradient(widened<float>(row.logits[column * row.stride])));
  }
}

// `upstream_of` has the gradients of the loss from the RowState; every thread asks it.
template <class Stored, bool kCapped, int kHeld, class Team, class UpstreamOf>
TETHER_TEAM void held_row_program(const Team& team, const RowParameters<kCapped>& in, int64_t index,
                                  const MutableLogits& dlogits, UpstreamOf upstream_of) {
  const RowMemory<Stored> row(in.logits, dlogits, index);
  const int64_t target = target_of(in, index);
  // Before anybody overwrites it.
  const float target_logit = target >= 0 ? widened<float>(row.logits[target * row.stride]) : 0;
  typename Team::template Local<HeldColumns<Stored, kHeld>> local;
  team.each(local, [&](int thread, HeldColumns<Stored, kHeld>& own) {
    const Stored* body = row.logits + row.parts.head;
    const int64_t step = team.threads(), count = row.parts.vectors;
    load_vectors<kHeld>(body, thread, step, count, own.vectors);
    add_vectors<kHeld>(in, own.vectors, own);
    add_vectors_from(in, body, kHeld * step + thread, step, count, own);
    add_singles(in, row.parts, row.logits, thread, step, own);
  });
  const auto sums = merged<false>(team, local, in.k());
  const RowState state = state_of(in, sums, target, target_logit);
  const RowUpstream arriving = upstream_of(state);
  if (arriving.dlogp == 0 && arriving.dentropy == 0) return clear_row(team, row);

  const Upstream upstream(arriving.dlogp, arriving.dentropy);
  const RowGradient<kCapped> gradient{GradientLine(state, upstream, in.slope_multiplier), in.k(),
                                      in.final_logit};
  const bool has_target =
      target >= 0 && state.target_logit > -math::detail::Format<float>::kInfinity;
  team.each(local, [&](int thread, HeldColumns<Stored, kHeld>& own) {
    store_columns(row, gradient, own, thread, team.threads());
    if (!has_target || !row.owns(thread, team.threads(), target)) return;
    row.out[target * row.out_stride] =
        narrowed<Stored>(gradient_of_target(in, state, upstream, target_logit));
  });
}

}  // namespace tether::cuda
