#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "../../core/sum.h"
#include "../token_weight.h"
#include "level_block.h"
#include "metric_sums.h"
#include "token_block.h"
#include "token_rows.h"

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

// The measures of one weight over the active tokens of a row.
struct MeasureSums {
  LaneSum sum;
  LaneMax largest, largest_negative;

  double reduced(WeightLevel level, double n) const {
    const double total = sum.total();
    const double trace = total * 0;  // the extremes know no NaN
    switch (level) {
      case WeightLevel::token:
      case WeightLevel::sequence_sum:
        return total;
      case WeightLevel::sequence_mean:
        return total / n;
      case WeightLevel::sequence_min:
        return -largest_negative.total() + trace;
      case WeightLevel::sequence_max:
        return largest.total() + trace;
    }
    return total;
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

// What the weights of a row share, in their order; those of tokens share nothing.
template <class T>
using WeightStatistics = std::array<T, kMaxWeights>;

template <bool kBounded, class T>
WeightStatistics<T> row_statistics(const PolicyArrays& batch,
                                   const std::vector<TokenWeight>& weights, int64_t row, double n,
                                   TokenBlock<T>& block) {
  WeightStatistics<T> out{};
  for (size_t k = 0; k < weights.size(); ++k) {
    const TokenWeight& weight = weights[k];
    if (weight.level == WeightLevel::token || n == 0) continue;
    MeasureSums sums;
    for_each_block(batch, row, block, [&](const Place&) {
      if constexpr (kBounded) saturate(batch, block);
      weight.formula.measure(weight_columns(weight.formula, block), block.statistic);
      sum_measures(block.weight, block.statistic, block.size, sums);
    });
    out[k] = narrow<T>(sums.reduced(weight.level, n), Largest<T>::kLogp);
  }
  return out;
}

// W of the tokens in a block, from what it starts with: the caller's weights, or 1.
template <class T>
void fill_weights(const std::vector<TokenWeight>& weights, const WeightStatistics<T>& statistics,
                  bool given, TokenBlock<T>& block) {
  if (given) {
    std::copy_n(block.given_weight, block.size, block.token_weight);
  } else {
    std::fill_n(block.token_weight, block.size, T(1));
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    const WeightFormula& formula = weights[k].formula;
    const WeightColumns<T> columns = weight_columns(formula, block);
    if (weights[k].level == WeightLevel::token) {
      formula.measure(columns, block.statistic);
    } else {
      std::fill_n(block.statistic, block.size, statistics[k]);
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
