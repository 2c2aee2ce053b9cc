#pragma once

#include <cstdint>

#include "../../core/elements.h"
#include "../../core/number.h"
#include "../../core/team.h"
#include "../../core/token_piece.h"
#include "../aggregation.h"
#include "../value_formula.h"
#include "../value_metrics.h"
#include "arrays.h"
#include "bounds.h"
#include "counts_program.h"

// The loss of a value head as programs of a team: value_loss.cu runs them on a device. As in
// value_loss.cc, in float; sums are in double.

namespace tether::cuda {

inline constexpr int kValueThreads = 256;

struct ValueParameters {
  ValueArrays batch;     // with old_values
  MutableArray dvalues;  // or absent
  Aggregation aggregation;
  double factor;         // of the whole loss
  const double* counts;  // of the step: tokens, sequences
  int64_t pieces;        // of a row
};

// The loss of some tokens and their ValueMetrics, as ValueTotals has them.
struct ValueNumbers {
  double loss = 0;
  double sums[ValueMetrics::kSums] = {};

  // As ValueMetrics::merge.
  TETHER_TEAM ValueNumbers merged(const ValueNumbers& other) const {
    using M = ValueMetrics;
    const double n = sums[M::kTokens], m = other.sums[M::kTokens];
    const auto between = [&](M::Sum sum) {
      const double gap = other.sums[sum] / m - sums[sum] / n;
      return n > 0 && m > 0 ? gap * gap * n * (m / (n + m)) : 0;
    };
    ValueNumbers out;
    out.loss = loss + other.loss;
    TETHER_UNROLL
    for (int i = 0; i < M::kSums; ++i) out.sums[i] = sums[i] + other.sums[i];
    out.sums[M::kReturnSpread] += between(M::kReturn);
    out.sums[M::kErrorSpread] += between(M::kError);
    return out;
  }
};

struct MergedValues {
  static TETHER_TEAM ValueNumbers none() { return {}; }
  static TETHER_TEAM ValueNumbers of(const ValueNumbers& before, const ValueNumbers& behind) {
    return before.merged(behind);
  }
};

// Of one thread. Sums of returns and errors are those of their distances from its first token's.
struct ValueSums {
  ValueNumbers numbers;
  double target = 0, error = 0;

  TETHER_TEAM void add(float w, float value, float R, float loss, bool is_clipped) {
    using M = ValueMetrics;
    double* sums = numbers.sums;
    const double weight = w;
    if (sums[M::kTokens] == 0) {
      target = R;
      error = R - value;
    }
    const double of_target = static_cast<double>(R) - target;
    const double of_error = static_cast<double>(R - value) - error;
    sums[M::kTokens] += weight;
    sums[M::kLoss] += weight * static_cast<double>(loss);
    sums[M::kClipped] += is_clipped ? weight : 0;
    sums[M::kReturn] += weight * of_target;
    sums[M::kReturnSquared] += weight * of_target * of_target;
    sums[M::kError] += weight * of_error;
    sums[M::kErrorSquared] += weight * of_error * of_error;
  }
  // The sums themselves, and the spreads.
  TETHER_TEAM ValueNumbers moved(double factor) const {
    using M = ValueMetrics;
    ValueNumbers out = numbers;
    out.loss = out.sums[M::kTokens] == 0 ? 0 : bounded(factor * out.sums[M::kLoss]);
    const auto move = [&](M::Sum sum, M::Sum squared, M::Sum spread, double to) {
      out.sums[sum] += 0 * out.sums[sum];  // infinity is NaN
      const double n = out.sums[M::kTokens], shift = n > 0 ? out.sums[sum] / n : 0;
      const double within = out.sums[squared] - shift * out.sums[sum];
      out.sums[spread] = within < 0 ? 0 : within;
      out.sums[sum] += n * to;
      out.sums[squared] = out.sums[spread] + (shift + to) * out.sums[sum];
    };
    move(M::kReturn, M::kReturnSquared, M::kReturnSpread, target);
    move(M::kError, M::kErrorSquared, M::kErrorSpread, error);
    return out;
  }
};

// Adds a token of weight w > 0, or NaN, and returns its gradient.
template <class Formula>
TETHER_TEAM float add_value(const Formula& formula, const ValueParameters& in, float factor,
                            int64_t row, int64_t column, float w, ValueSums& sums) {
  const auto number = [&](const ConstArray& array) {
    return saturated(load(in.batch.layout, array, row, column), Largest<float>::kInput);
  };
  const float value = number(in.batch.values), old_value = number(in.batch.old_values);
  const float target = number(in.batch.returns);
  const Dual<float> found = formula(ValueToken<Dual<float>>{{value, 1}, {old_value}, {target}});
  const float broken = zero_or_nan(value, old_value, target, w);  // or 0
  const float loss = bounded(found.value) + broken, dloss = bounded(found.grad) + broken;
  sums.add(w, value, target, loss, dloss == 0 && found.value > 0);
  return bounded(w * factor * dloss);
}

// The tokens of a row.
template <class Team>
TETHER_TEAM double row_tokens(const Team& team, const ValueArrays& batch, int64_t row) {
  struct Own {
    double n = 0;
  };
  typename Team::template Local<Own> local;
  team.each(local, [&](int thread, Own& own) {
    for (int64_t i = thread; i < batch.layout.length(row); i += Team::kThreads) {
      own.n += static_cast<double>(load_mask(batch.layout, batch.response_mask, row, i));
    }
  });
  return team.template reduce<Sum>(local, [](const Own& own) { return Several<double, 1>{own.n}; })
      .each[0];
}

template <class Formula, class Team>
TETHER_TEAM void value_row_program(const Team& team, const Formula& formula,
                                   const ValueParameters& in, int64_t index, ValueNumbers* pieces) {
  const TokenPiece piece(in.batch.layout, index, in.pieces);
  const bool by_length = in.aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
  const double n = by_length ? row_tokens(team, in.batch, piece.row) : 0;
  const double share = checked_row_factor(in.aggregation, {in.counts[0], in.counts[1]}, n);
  const double factor = bounded(bounded(in.factor) * share);
  typename Team::template Local<ValueSums> local;
  team.each(local, [&](int thread, ValueSums& own) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const float w = load_mask(in.batch.layout, in.batch.response_mask, piece.row, i);
      const float gradient =
          w == 0 ? 0 : add_value(formula, in, narrow<float>(factor), piece.row, i, w, own);
      if (in.dvalues) store(in.batch.layout, in.dvalues, piece.row, i, gradient);
    }
  });
  const ValueNumbers all = team.template scan_back<MergedValues>(
      local, [&](const ValueSums& own) { return own.moved(factor); },
      [](ValueSums&, const ValueNumbers&) {});
  team.each(local, [&](int thread, ValueSums&) {
    if (thread == 0) pieces[index] = all;
  });
}

// Those of all pieces.
template <class Team>
TETHER_TEAM void merge_values_program(const Team& team, const ValueNumbers* pieces, int64_t count,
                                      ValueNumbers* out) {
  typename Team::template Local<ValueNumbers> local;
  team.each(local, [&](int thread, ValueNumbers& own) {
    for (int64_t i = thread; i < count; i += Team::kThreads) own = own.merged(pieces[i]);
  });
  const ValueNumbers all = team.template scan_back<MergedValues>(
      local, [](const ValueNumbers& own) { return own; },
      [](ValueNumbers&, const ValueNumbers&) {});
  team.each(local, [&](int thread, ValueNumbers&) {
    if (thread == 0) *out = all;
  });
}

// ---- counts -------------------------------------------------------------------------------------

template <class Team>
TETHER_TEAM void count_values_program(const Team& team, const ValueArrays& batch, int64_t row,
                                      double* rows) {
  const double n = row_tokens(team, batch, row);
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread == 0) rows[row] = n;
  });
}

// counts[2], of all rows.
template <class Team>
TETHER_TEAM void add_value_counts_program(const Team& team, const double* rows, int64_t count,
                                          double* counts) {
  const TermCounts all = counts_of_rows(team, rows, count);
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread != 0) return;
    counts[0] = all.tokens;
    counts[1] = all.sequences;
  });
}

// ---- the kernels of a loss, in their order, by a `Launch` that runs each -----------------------

// In the caller's memory, one after the other.
struct ValueWorkspace {
  double* counts;        // [2]
  ValueNumbers* pieces;  // of all rows; the counts of rows before them

  static int64_t bytes(const RowLayout& layout) {
    return static_cast<int64_t>(sizeof(double)) * 2 +
           layout.rows * pieces_of_rows(layout) * static_cast<int64_t>(sizeof(ValueNumbers));
  }
  explicit ValueWorkspace(void* memory)
      : counts(static_cast<double*>(memory)), pieces(reinterpret_cast<ValueNumbers*>(counts + 2)) {}
};

template <class Launch>
void run_value_counts(const ValueArrays& batch, const ValueWorkspace& workspace, double* counts,
                      const Launch& launch) {
  auto* rows = reinterpret_cast<double*>(workspace.pieces);
  launch.count(batch, rows);
  launch.add_counts(rows, batch.layout.rows, counts);
}

template <class Launch>
void run_value_loss(const ValueArrays& batch, const ValueFormula& formula,
                    const Aggregation& aggregation, const double* counts, double factor,
                    const MutableArray& dvalues, ValueTotals* totals,
                    const ValueWorkspace& workspace, const Launch& launch) {
  static_assert(sizeof(ValueTotals) == sizeof(ValueNumbers));
  if (counts == nullptr) {
    run_value_counts(batch, workspace, workspace.counts, launch);
    counts = workspace.counts;
  }
  const int64_t pieces = pieces_of_rows(batch.layout);
  ValueParameters in{batch, dvalues, aggregation, factor, counts, pieces};
  if (!batch.old_values) in.batch.old_values = batch.values;
  launch.rows(formula, in, workspace.pieces);
  launch.merge(workspace.pieces, batch.layout.rows * pieces,
               reinterpret_cast<ValueNumbers*>(totals));
}

}  // namespace tether::cuda
