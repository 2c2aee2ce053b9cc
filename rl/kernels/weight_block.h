#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "../../core/sum.h"
#include "../token_weight.h"
#include "level_block.h"
#include "measures.h"
#include "metric_sums.h"
#include "token_block.h"
#include "token_rows.h"
#include "turns.h"

// The loops over a block of tokens that weights add (rl/token_weight.h).

namespace tether {

// For what a weight does not say that it reads: one that reads it all the same is NaN.
template <class T>
struct Unread {
  T logp[kBlock];

  constexpr Unread() : logp{} {
    for (T& each : logp) each = std::numeric_limits<T>::quiet_NaN();
  }
};
template <class T>
constexpr Unread<T> kUnread;

// The columns of a block that a weight reads.
template <class T>
WeightColumns<T> weight_columns(const WeightFormula& formula, const TokenBlock<T>& block) {
  const Traits& traits = formula.traits();
  return {traits.reads_policy ? block.logp : kUnread<T>.logp,
          block.old_logp,
          traits.needs_ref_logps ? block.ref_logp : kUnread<T>.logp,
          traits.needs_rollout_logps ? block.rollout_logp : kUnread<T>.logp,
          block.advantage,
          block.size};
}

// The same of a row, side by side.
struct MeasureSums {
  LaneSum sum;
  LaneMax largest, largest_negative;

  MeasureTotals totals(double n) const {
    return {n, sum.total(), largest.total(), -largest_negative.total()};
  }
};

template <class T>
TETHER_CLONES void sum_measures(const T* weight, const T* measure, int size, MeasureSums& out) {
  using Order = Order<T>;
  constexpr Order kLast = order_of(std::numeric_limits<T>::infinity()), kFirst = ~kLast;
  double sums[kLanes];
  T highest[kLanes], lowest[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    Order most = kFirst, least = kLast;
    int start = 0;
    do {
      const T w = weight[start + lane], x = measure[start + lane];
      const Mask<T> active = mask<T>(w != T(0));
      sum += double(keep(active, w)) * double(keep(active, x));
      const Order seen = Order(active), order = order_of(x) & seen;
      const Order above = order | (kFirst & ~seen), below = order | (kLast & ~seen);
      most = above > most ? above : most;
      least = below < least ? below : least;
      start += kLanes;
    } while (start < size);
    sums[lane] = sum;
    highest[lane] = in_order<T>(most);
    lowest[lane] = -in_order<T>(least);
  }
  out.sum.add(sums);
  out.largest.add(highest);
  out.largest_negative.add(lowest);
}

// The weights of a statistic where A is negative, 0 and positive; NaN of a formula that looks at
// more.
template <class T>
struct WeightsOfSigns {
  T negative, zero, positive;
};

template <class T>
WeightsOfSigns<T> weights_of_signs(const WeightFormula& formula, T statistic) {
  T advantages[16] = {-1, 0, 1}, statistics[16], weights[16];
  std::fill_n(statistics, 16, statistic);
  std::fill_n(weights, 16, T(1));
  const T* unread = kUnread<T>.logp;
  formula.multiply(WeightColumns<T>{unread, unread, unread, unread, advantages, 16}, statistics,
                   weights);
  return {weights[0], weights[1], weights[2]};
}

template <class T>
TETHER_CLONES void multiply_by_signs(const WeightsOfSigns<T>& of_signs, TokenBlock<T>& block) {
  const T negative = of_signs.negative, zero = of_signs.zero, positive = of_signs.positive;
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T A = block.advantage[i];
    const T of_other = A > T(0) ? positive : zero;
    block.token_weight[i] *= A < T(0) ? negative : of_other;
  }
}

// The tokens that share a statistic: from `begin`, a column of the row, to where the next one
// begins.
template <class T>
struct WeightSegment {
  int64_t begin = 0;
  MeasureTotals measures = {};
  T statistic = 0;
  WeightsOfSigns<T> of_signs = {};  // of a row
};

// What the weights of a row share, in their order; those of tokens share nothing. The first segment
// of a weight begins at 0.
template <class T>
using WeightStatistics = std::array<std::vector<WeightSegment<T>>, kMaxWeights>;

// Tokens as the totals of a turn add them up.
struct MeasureColumns {
  alignas(64) double weight[kBlock];
  alignas(64) double measure[kBlock];  // times w
};

template <class T>
TETHER_CLONES void fill_measure_columns(const TokenBlock<T>& block, MeasureColumns& out) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = block.weight[i];
    out.weight[i] = double(w);
    out.measure[i] = double(w) * double(keep(mask<T>(w != T(0)), block.statistic[i]));
  }
}

// Adds a part of a block to the totals of its turn.
TETHER_CLONES inline void add_part(const MeasureColumns& in, int begin, int end,
                                   MeasureTotals& out) {
  using Column = std::pair<const double*, FourChains&>;
  FourChains n, sum;
  add_part(begin, end, Column(in.weight, n), Column(in.measure, sum));
  out.n += n.total();
  out.sum += sum.total();
}

// Adds the measures in a block to those of its turns.
template <class T>
void add_to_turns(const Place& place, Reduction reduction, const TokenBlock<T>& block,
                  TurnScan<T>& scan, std::vector<WeightSegment<T>>& turns) {
  scan.for_each_begin(place, block.weight,
                      [&](int i) { turns.emplace_back().begin = place.column + i; });
  MeasureColumns columns;
  fill_measure_columns(block, columns);
  const bool of_extremes = reduction == Reduction::min || reduction == Reduction::max;
  for_each_part(turns, place, block.size, [&](WeightSegment<T>& turn, int begin, int end) {
    add_part(columns, begin, end, turn.measures);
    for (int i = begin; of_extremes && i < end; ++i) {
      if (block.weight[i] != 0) turn.measures.extend(double(block.statistic[i]));
    }
  });
}

// Those of a row of n tokens.
template <bool kBounded, class T>
void find_statistics(const PolicyArrays& batch, const std::vector<TokenWeight>& weights,
                     const TurnMarks& marks, int64_t row, double n, TokenBlock<T>& block,
                     WeightStatistics<T>& out) {
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto& [formula, level] = weights[k];
    const WeightLevelRule& rule = rule_of(level);
    if (rule.segment == Segment::token) continue;
    out[k].assign(1, {});
    MeasureSums of_row;
    TurnScan<T> scan(marks, batch.layout);
    for_each_block(batch, row, block, [&](const Place& place) {
      if constexpr (kBounded) saturate(batch, block);
      formula.measure(weight_columns(formula, block), block.statistic);
      if (rule.segment == Segment::turn)
        return add_to_turns(place, rule.reduction, block, scan, out[k]);
      sum_measures(block.weight, block.statistic, block.size, of_row);
    });
    if (rule.segment == Segment::row) out[k][0].measures = of_row.totals(n);
    for (WeightSegment<T>& each : out[k]) {
      if (each.measures.n == 0) continue;
      each.statistic = narrow<T>(each.measures.reduced(rule.reduction), Largest<T>::kInput);
      if (rule.segment == Segment::row && formula.traits().by_sign)
        each.of_signs = weights_of_signs(formula, each.statistic);
    }
  }
}

// For a copy, which is faster than a fill here: this is no vector loop.
template <class T>
inline constexpr auto kOnes = [] {
  std::array<T, kBlock> out{};
  for (T& each : out) each = 1;
  return out;
}();

// W of the tokens in a block, from what it starts with: the caller's weights, or 1.
template <class T>
void fill_weights(const std::vector<TokenWeight>& weights, const Place& place,
                  WeightStatistics<T>& statistics, bool given, TokenBlock<T>& block) {
  std::copy_n(given ? block.given_weight : kOnes<T>.data(), block.size, block.token_weight);
  for (size_t k = 0; k < weights.size(); ++k) {
    const WeightFormula& formula = weights[k].formula;
    const Segment segment = rule_of(weights[k].level).segment;
    if (segment == Segment::row && formula.traits().by_sign) {
      multiply_by_signs(statistics[k][0].of_signs, block);
      continue;
    }
    const WeightColumns<T> columns = weight_columns(formula, block);
    if (segment == Segment::token) {
      formula.measure(columns, block.statistic);
    } else {
      for_each_part(statistics[k], place, block.size, [&](const auto& each, int begin, int end) {
        std::fill(block.statistic + begin, block.statistic + end, each.statistic);
      });
    }
    formula.multiply(columns, block.statistic, block.token_weight);
  }
}

// Adds W, W^2 and the tokens that it takes out.
template <class T>
TETHER_CLONES void sum_token_weights(const TokenBlock<T>& block, MetricSums& metrics) {
  using M = PolicyMetrics;
  using Order = Order<T>;
  constexpr Order kFirst = ~order_of(std::numeric_limits<T>::infinity());
  T sums[kLanes], squares[kLanes], zeros[kLanes], highest[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    T sum = 0, square = 0, zero = 0;
    Order most = kFirst;
    int start = 0;
    do {
      const T w = block.weight[start + lane];
      const Mask<T> active = mask<T>(w != T(0));
      const T W = bounded(keep(active, block.token_weight[start + lane]), kLargestRatio<T>);
      const T weighted = w * W;
      sum += weighted;
      square += weighted * W;
      zero += keep(mask<T>(W == T(0)), w);
      const Order seen = Order(active), order = order_of(W) & seen;
      const Order above = order | (kFirst & ~seen);
      most = above > most ? above : most;
      start += kLanes;
    } while (start < block.size);
    sums[lane] = sum;
    squares[lane] = square;
    zeros[lane] = zero;
    highest[lane] = in_order<T>(most);
  }
  metrics.sums[M::kWeight].add(sums);
  metrics.sums[M::kWeightSquared].add(squares);
  metrics.sums[M::kWeightZero].add(zeros);
  metrics.maxima[M::kWeightMax].add(highest);
}

}  // namespace tether
