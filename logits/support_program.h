#pragma once

#include <cstdint>

#include "held_pair_program.h"
#include "row_program.h"
#include "support_cuda.h"

// Rows of logits at their kept ids (support.h) as programs of a team: support.cu runs them on a
// device. A row without ids goes to the programs of whole rows.

namespace tether::cuda {

inline constexpr int kSupportThreads = 256;

// What the ids say that one thread has seen: 1 for yes.
struct IdsSeen {
  float any = 0, target = 0, unknown = 0;
};

// What all of a row say. spoiled: its results are NaN.
struct SeenSet {
  bool whole, spoiled;
};

// The kept ids of a row, of which the columns are [first, first + columns) of `all`.
struct KeptRow {
  const KeptIds& kept;
  int64_t row, first, columns, all, size;

  TETHER_TEAM KeptRow(const KeptIds& ids, int64_t index, int64_t first_id, int64_t vocabulary,
                      int64_t of_all)
      : kept(ids),
        row(index),
        first(first_id),
        columns(vocabulary),
        all(of_all),
        size(ids.layout.length(index)) {}
  template <bool kCapped>
  TETHER_TEAM KeptRow(const KeptIds& ids, int64_t index, const RowParameters<kCapped>& in)
      : KeptRow(ids, index, in.first_id, in.logits.vocabulary, in.ids) {}

  // Its place in memory for all ids.
  TETHER_TEAM int64_t place(int64_t i) const {
    return (kept.layout.packed() ? kept.layout.offset(row) : row * size) + i;
  }
  // visit(place, column) for those of a thread that are here.
  template <class Visit>
  TETHER_TEAM void for_each(int thread, int64_t threads, Visit visit) const {
    for (int64_t i = thread; i < size; i += threads) {
      const int64_t id = kept.id(row, i), column = id - first;
      if (id >= 0 && column >= 0 && column < columns) visit(place(i), column);
    }
  }
  // targets: those of all rows, or null.
  TETHER_TEAM IdsSeen seen(int thread, int64_t threads, const int64_t* targets) const {
    IdsSeen out;
    for (int64_t i = thread; i < size; i += threads) {
      const int64_t id = kept.id(row, i);
      if (id == -1) continue;
      out.any = 1;
      if (targets == nullptr || id == targets[row]) out.target = 1;
      if (id < 0 || id >= all) out.unknown = 1;
    }
    return out;
  }
};

// Of what each thread has seen.
template <class Team, class Local>
TETHER_TEAM SeenSet seen_set(const Team& team, const Local& local) {
  const auto all = team.template reduce<Max>(local, [](const auto& own) {
    return Several<float, 3>{own.seen.any, own.seen.target, own.seen.unknown};
  });
  const bool whole = all.each[0] == 0;
  return {whole, !whole && (all.each[1] == 0 || all.each[2] != 0)};
}

// Until all threads have come here: what they have written can be read.
template <class Team, class Local>
TETHER_TEAM void wait_for_all(const Team& team, const Local& local) {
  team.template reduce<Max>(local, [](const auto&) { return Several<float, 1>{0}; });
}

// ---- log-probabilities --------------------------------------------------------------------------

struct KeptSums : ColumnSums<true> {
  IdsSeen seen;
};

template <class Stored, bool kCapped, class Team>
TETHER_TEAM void support_statistics_program(const Team& team, const RowParameters<kCapped>& in,
                                            const KeptIds& kept, int64_t row,
                                            const RowResults& out) {
  typename Team::template Local<KeptSums> local;
  SeenSet set{true, false};
  const int64_t target = target_of(in, row);
  const Stored* logits = row_of<Stored>(in.logits, row);
  if (!in.is_ignored(row)) {
    const KeptRow ids(kept, row, in);
    team.each(local, [&](int thread, KeptSums& own) {
      own.seen = ids.seen(thread, Team::kThreads, in.targets);
      ids.for_each(thread, Team::kThreads, [&](int64_t, int64_t column) {
        const float x = in.final_logit(widened<float>(logits[column * in.logits.stride]));
        own.move(fmaxf(own.reference, x), in.k());
        own.add(x, in.k());
      });
    });
    set = seen_set(team, local);
  }
  if (set.whole) return row_statistics_program<Stored, kCapped, true>(team, in, row, out);
  const auto sums = merged<true>(team, local, in.k());
  team.each(local, [&](int thread, KeptSums&) {
    if (thread != 0) return;
    const float logit = target >= 0 ? widened<float>(logits[target * in.logits.stride]) : 0;
    const RowState state = state_of(in, sums, set.spoiled ? kNoId : target, logit);
    put_results<true>(out, row, state, in.multiplier);
  });
}

struct KeptColumns {
  IdsSeen seen;
};

// `pieces`: of a whole row, as for row_gradient_program; here one team has them all.
template <class Stored, bool kCapped, class Team>
TETHER_TEAM void support_gradient_program(const Team& team, const RowParameters<kCapped>& in,
                                          const KeptIds& kept, int64_t row, int pieces,
                                          const RowState* states, const float* dlogps,
                                          const float* dentropies, float* memory,
                                          const MutableLogits& dlogits) {
  typename Team::template Local<KeptColumns> local;
  const Stored* logits = row_of<Stored>(in.logits, row);
  Stored* out = row_of<Stored>(dlogits, row);
  const KeptRow ids(kept, row, in);
  const int64_t target = target_of(in, row);
  const float dlogp = dlogps != nullptr ? dlogps[row] : 0;
  const float dentropy = dentropies != nullptr ? dentropies[row] : 0;
  SeenSet set{true, false};
  if (!in.is_ignored(row) && (dlogp != 0 || dentropy != 0)) {
    team.each(local, [&](int thread, KeptColumns& own) {
      own.seen = ids.seen(thread, Team::kThreads, in.targets);
      ids.for_each(thread, Team::kThreads, [&](int64_t place, int64_t column) {
        memory[place] = widened<float>(logits[column * in.logits.stride]);
      });
    });
    set = seen_set(team, local);
  }
  for (int piece = 0; piece < pieces; ++piece) {
    if (set.whole) {
      row_gradient_program<Stored, kCapped>(team, in, row, piece, pieces, states, dlogps,
                                            dentropies, dlogits);
      continue;
    }
    const RowParts<Stored> parts(in.logits.vocabulary, dlogits.stride == 1, shift_of<Stored>(out));
    clear_piece(team, RowPiece<Team, Stored>{parts, piece, pieces}, out, dlogits.stride);
  }
  if (set.whole) return;
  wait_for_all(team, local);
  const RowState state = states[row];
  const Upstream upstream(dlogp, dentropy);
  const RowGradient<kCapped> gradient{GradientLine(state, upstream, in.slope_multiplier), in.k(),
                                      in.final_logit};
  const bool has_target = state.target_logit > -math::detail::Format<float>::kInfinity;
  team.each(local, [&](int thread, KeptColumns&) {
    ids.for_each(thread, Team::kThreads, [&](int64_t place, int64_t column) {
      const float logit = memory[place];
      const bool is_target = column == target && has_target;
      out[column * dlogits.stride] = narrowed<Stored>(
          is_target ? gradient_of_target(in, state, upstream, logit) : gradient(logit));
    });
  });
}

// ---- divergences --------------------------------------------------------------------------------

// Both rows at their kept ids, or all of them. Nothing is held: what a thread has written over it
// finds in `memory`, or has read before.
template <class Stored>
struct KeptPairRow {
  KeptRow ids;
  PairRow<Stored> rows;
  float* memory;  // or null
  bool whole;

  TETHER_TEAM void put(int64_t place, int64_t column) const {
    if (memory == nullptr) return;
    memory[2 * place] = rows.q_at(column);
    memory[2 * place + 1] = rows.p_at(column);
  }
};

struct KeptPair : PairBelow {
  IdsSeen seen;
};

template <class Stored, class Visit>
TETHER_TEAM void for_each_held(const KeptPairRow<Stored>& row, const KeptPair&, int thread,
                               int64_t threads, Visit visit) {
  if (row.whole) return for_each_read(row.rows, thread, thread, threads, visit);
  row.ids.for_each(thread, threads, [&](int64_t place, int64_t column) {
    const float* both = row.memory == nullptr ? nullptr : row.memory + 2 * place;
    const float x = both == nullptr ? row.rows.q_at(column) : both[0];
    const float y = both == nullptr ? row.rows.p_at(column) : both[1];
    visit(column, &x, &y, Count<1>{});
  });
}

template <class Team, class Local, class Stored>
TETHER_TEAM HeldTotals kept_totals(const Team& team, Local& local, KeptPairRow<Stored>& row,
                                   float k) {
  team.each(local, [&](int thread, KeptPair& own) {
    own.seen = row.ids.seen(thread, team.threads(), nullptr);
    row.ids.for_each(thread, team.threads(),
                     [&](int64_t place, int64_t column) { row.put(place, column); });
  });
  const SeenSet set = seen_set(team, local);
  row.whole = set.whole;
  team.each(local,
            [&](int thread, KeptPair& own) { find_references(row, own, thread, team.threads()); });
  HeldTotals out = held_totals(team, local, row, k);
  if (set.spoiled) out.all.sum_q = out.all.sum_p = math::detail::Format<float>::kNaN;
  return out;
}

template <class Stored, class Team>
TETHER_TEAM void support_kl_program(const Team& team, const PairParameters& in, const KeptIds& kept,
                                    int64_t index, const PairKlArrays<const float>& upstreams,
                                    const PairKlArrays<float>& values, float* memory,
                                    const MutableLogits& dq, const MutableLogits& dp) {
  const PairOutputs<Stored> out{{dq, index}, {dp, index}};
  KeptPairRow<Stored> row{{kept, index, 0, in.q.vocabulary, in.q.vocabulary},
                          {in, index, out.in_vectors(in, index)},
                          memory,
                          false};
  const PairUpstream upstream(upstreams, index);
  const bool is_read = in.is_active(index) && (has_any(values) || !upstream.is_zero());
  typename Team::template Local<KeptPair> local;
  HeldTotals totals{};
  PairKl found{0, 0, 0};
  if (is_read) {
    totals = kept_totals(team, local, row, in.k());
    found = values_of(totals.all);
  }
  team.each(local, [&](int thread, KeptPair&) {
    if (thread == 0) put_values(values, index, found);
  });
  if (dq.data == nullptr && dp.data == nullptr) return;
  const bool is_zero = !is_read || upstream.is_zero();
  if (is_zero || !row.whole) clear_pair(team, row.rows, out);
  if (is_zero) return;
  wait_for_all(team, local);
  write_pair(team, local, row, {totals, found, upstream, in.multiplier}, out, in.k());
}

}  // namespace tether::cuda
