#include "rl/kernels/value_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/sum.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

template <class T>
struct ValueBlock {
  alignas(64) T weight[kBlock];
  alignas(64) T value[kBlock];
  alignas(64) T old_value[kBlock];
  alignas(64) T target[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T dloss[kBlock];
  alignas(64) T dvalue[kBlock];
  int size;
};

// A return and an error of a row, from which the others deviate little.
struct Pivot {
  double target = 0, error = 0;
  bool found = false;

  // The first active token.
  template <class T>
  void find(const ValueBlock<T>& block) {
    for (int i = 0; i < block.size && !found; ++i) {
      if (block.weight[i] == T(0)) continue;
      *this = {double(block.target[i]), double(block.target[i] - block.value[i]), true};
    }
  }
};

// Of the deviations from a pivot, where a sum is of returns or errors.
using ValueSums = std::array<LaneSum, ValueMetrics::kErrorSquared + 1>;

ValueMetrics metrics_of(const ValueSums& totals, const Pivot& pivot) {
  using M = ValueMetrics;
  M out;
  for (size_t i = 0; i < totals.size(); ++i) out.sums[i] = totals[i].total();
  const auto move = [&](M::Sum sum, M::Sum squared, M::Sum spread, double to) {
    out.sums[sum] += 0 * out.sums[sum];  // infinity is NaN
    const double n = out.sums[M::kTokens], shift = n > 0 ? out.sums[sum] / n : 0;
    out.sums[spread] = std::max(out.sums[squared] - shift * out.sums[sum], 0.0);
    out.sums[sum] += n * to;
    out.sums[squared] = out.sums[spread] + (shift + to) * out.sums[sum];
  };
  move(M::kReturn, M::kReturnSquared, M::kReturnSpread, pivot.target);
  move(M::kError, M::kErrorSquared, M::kErrorSpread, pivot.error);
  return out;
}

// The loss of each token, of inputs that are saturated in place.
template <class T>
void fill_losses(const ValueFormula& formula, ValueBlock<T>& block) {
  for (T* column : {block.value, block.old_value, block.target}) {
    saturate_column(Largest<T>::kInput, block.size, column);
  }
  formula(ValueColumns<T>{block.value, block.old_value, block.target, block.size}, block.loss,
          block.dloss);
}

// Adds a block in double and makes its gradient.
template <class T>
TETHER_CLONES void sum_values(T factor, const Pivot& pivot_in, ValueBlock<T>& block,
                              ValueSums& totals) {
  using M = ValueMetrics;
  const Pivot pivot = pivot_in;
  double sums[std::tuple_size_v<ValueSums>][kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double tokens = 0, loss = 0, returns = 0, squares = 0, errors = 0, error_squares = 0;
    T clipped = 0;
    int start = 0;
    do {
      const int i = start + lane;
      const T w = block.weight[i], value = block.value[i], gap = block.target[i] - value;
      const Mask<T> active = mask<T>(w != T(0));
      const T trace = zero_or_nan(value, block.old_value[i], block.target[i], T(0));
      const Mask<T> broken = active & mask<T>(trace != T(0));
      const T each = spoil(broken, bounded(block.loss[i]));
      const T dloss = spoil(broken, bounded(block.dloss[i]));
      const double weight = double(w), error = double(gap) - pivot.error;
      const double target = double(block.target[i]) - pivot.target;
      tokens += weight;
      loss += weight * double(keep(active, each));
      returns += weight * target;
      squares += weight * target * target;
      errors += weight * error;
      error_squares += weight * error * error;
      clipped += keep(mask<T>(dloss == T(0)) & mask<T>(block.loss[i] > T(0)), w);
      block.dvalue[i] = keep(active, bounded(w * factor * dloss));
      start += kLanes;
    } while (start < block.size);
    sums[M::kTokens][lane] = tokens;
    sums[M::kLoss][lane] = loss;
    sums[M::kClipped][lane] = double(clipped);
    sums[M::kReturn][lane] = returns;
    sums[M::kReturnSquared][lane] = squares;
    sums[M::kError][lane] = errors;
    sums[M::kErrorSquared][lane] = error_squares;
  }
  for (size_t i = 0; i < totals.size(); ++i) totals[i].add(sums[i]);
}

// visit(column, count) for every block of the row, with its weights loaded.
template <class T, class Visit>
void for_each_block(const ValueArrays& batch, int64_t row, ValueBlock<T>& block, Visit visit) {
  const int64_t length = batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    block.size = whole_lanes(count);
    load_block<T>(batch.layout, batch.response_mask, row, column, count, nullptr, block.weight);
    visit(column, count);
  }
}

template <class T>
std::vector<double> tokens_of_rows(const ValueArrays& batch, const Executor& executor) {
  std::vector<double> out(static_cast<size_t>(batch.layout.rows));
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    ValueBlock<T> block;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      LaneSum tokens;
      for_each_block(batch, row, block,
                     [&](int64_t, int) { sum_weights(block.weight, block.size, tokens); });
      out[static_cast<size_t>(row)] = tokens.total();
    }
  });
  for (double tokens : out) {
    if (std::isnan(tokens)) check_weights("value_loss", batch.layout, batch.response_mask);
  }
  return out;
}

struct Part {
  double loss = 0;
  ValueMetrics metrics;
};

template <class T>
void add_row(const ValueArrays& batch, const ValueObjective& objective, int64_t row, double factor,
             const MutableArray& dvalues, ValueBlock<T>& block, Part& part) {
  const ConstArray& old_values = batch.old_values ? batch.old_values : batch.values;
  ValueSums sums;
  Pivot pivot;
  for_each_block(batch, row, block, [&](int64_t column, int count) {
    const auto load = [&](const ConstArray& array, T* out) {
      load_block(batch.layout, array, row, column, count, block.weight, out);
    };
    load(batch.values, block.value);
    load(old_values, block.old_value);
    load(batch.returns, block.target);
    fill_losses(objective.loss, block);
    pivot.find(block);
    sum_values(narrow<T>(factor), pivot, block, sums);
    if (dvalues) store_block(batch.layout, dvalues, row, column, count, block.dvalue);
  });
  part.loss += bounded(factor * sums[ValueMetrics::kLoss].total());
  part.metrics.merge(metrics_of(sums, pivot));
}

template <class T>
ValueTotals total_loss(const ValueArrays& batch, const ValueObjective& objective,
                       const Normalizer& normalizer, const MutableArray& dvalues,
                       const Executor& executor) {
  const std::vector<double> tokens = tokens_of_rows<T>(batch, executor);
  TermCounts local;
  for (double n : tokens) {
    local.tokens += n;
    local.sequences += n > 0 ? 1 : 0;
  }
  const TermCounts step =
      step_counts("value_loss", normalizer, local, objective.aggregation).policy;
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  std::array<Part, kMaxChunks> parts;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    ValueBlock<T> block;
    Part& part = parts[static_cast<size_t>(chunk)];
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const double n = tokens[static_cast<size_t>(row)];
      const double factor =
          bounded(bounded(normalizer.factor()) * row_factor(objective.aggregation, step, n));
      add_row(batch, objective, row, factor, dvalues, block, part);
    }
  });
  ValueTotals out;
  for (const Part& part : parts) {
    out.loss += part.loss;
    out.metrics.merge(part.metrics);
  }
  return out;
}

}  // namespace

ValueTotals value_loss(const ValueArrays& batch, const ValueObjective& objective,
                       const Normalizer& normalizer, const MutableArray& dvalues,
                       const Executor& executor) {
  const auto function = "value_loss";
  check_objective(function, objective);
  check_inputs(function, batch);
  check_array(function, "dvalues", batch.layout, dvalues);
  const auto total = batch.values.dtype == DType::float64 ? total_loss<double> : total_loss<float>;
  return total(batch, objective, normalizer, dvalues, executor);
}

}  // namespace tether
