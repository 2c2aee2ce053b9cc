#include "estimators/advantage/gae.h"

#include <algorithm>
#include <string_view>

#include "core/bit_cast.h"
#include "core/check.h"
#include "core/fields.h"
#include "core/macros.h"

namespace tether {

namespace {

// One row of GaeArrays, a block at a time.
struct GaeBlock {
  double weight[kBlock], reward[kBlock], value[kBlock], done[kBlock], truncated[kBlock],
      truncation_value[kBlock], lambda[kBlock], advantage[kBlock], result[kBlock];

  // Absent arrays stay as they are here.
  explicit GaeBlock(double lambda_of_all) {
    for (double* each : {value, done, truncated, truncation_value}) std::fill_n(each, kBlock, 0.0);
    std::fill_n(lambda, kBlock, lambda_of_all);
  }

  void load(const GaeArrays& batch, int64_t row, int64_t column, int count) {
    const auto read = [&](const ConstArray& array, const double* weights, double* out) {
      if (array) load_block<double>(batch.layout, array, row, column, count, weights, out);
    };
    read(batch.response_mask, nullptr, weight);
    read(batch.rewards, weight, reward);
    read(batch.values, weight, value);
    read(batch.done, weight, done);
    read(batch.truncated, weight, truncated);
    read(batch.truncation_values, weight, truncation_value);
    read(batch.lambdas, weight, lambda);
  }
};

void store(const RowLayout& layout, const MutableArray& advantages, const MutableArray& returns,
           int64_t row, int64_t column, int count, const GaeBlock& block) {
  store_block(layout, advantages, row, column, count, block.advantage);
  if (returns) store_block(layout, returns, row, column, count, block.result);
}

// What one token passes to the one before it.
struct GaeState {
  double value = 0;
  double advantage = 0;
};

// x where the mask is all ones, 0 where it is 0, whatever x is there.
TETHER_INLINE double keep(uint64_t mask, double x) {
  return bit_cast<double>(mask & bit_cast<uint64_t>(x));
}

// The recursion where nothing ends within the row and gaps are passed over, without a branch: a
// mask is nothing that a processor could predict. Slots of weight 0 hold zeros; with m = 0 there, 1
// else,
//   A = m (r - V) + m gamma V_next + (m gamma lambda + 1 - m) A_next,   V = m V + (1 - m) V_next
// and all but the products with what follows is known beforehand. m selects: what follows may be
// NaN.
TETHER_CLONES GaeState carried(double gamma, int count, GaeState next, GaeBlock& block) {
  alignas(64) uint64_t token[kBlock];
  alignas(64) double base[kBlock], kept[kBlock];
  for (int i = 0; i < count; ++i) {
    token[i] = block.weight[i] != 0 ? ~uint64_t{0} : 0;
    base[i] = block.reward[i] - block.value[i];
    kept[i] = block.weight[i] != 0 ? gamma * block.lambda[i] : 1.0;
  }
  for (int i = count - 1; i >= 0; --i) {
    next.advantage = (base[i] + keep(token[i], gamma * next.value)) + kept[i] * next.advantage;
    next.value = block.value[i] + keep(~token[i], next.value);
    block.advantage[i] = next.advantage;
  }
  for (int i = 0; i < count; ++i) {
    block.advantage[i] = keep(token[i], block.advantage[i]);
    block.result[i] = block.advantage[i] + block.value[i];
  }
  return next;
}

// Asks for the block that is wanted after the one of `row` that ends before `column`: rows are
// walked from their ends, which no processor expects.
void prefetch_next(const GaeArrays& batch, const MutableArray& advantages,
                   const MutableArray& returns, int64_t row, int64_t column) {
  const RowLayout& layout = batch.layout;
  if (column == 0 && ++row < layout.rows) column = layout.length(row);
  const int count = static_cast<int>(std::min<int64_t>(kBlock, column));
  if (count == 0 || row == layout.rows) return;
  for (const ConstArray* array : {&batch.response_mask, &batch.rewards, &batch.values}) {
    prefetch_block(layout, *array, row, column - count, count);
  }
  for (const MutableArray* array : {&advantages, &returns}) {
    prefetch_block(layout, *array, row, column - count, count);
  }
}

void gae_of_row(const GaeArrays& batch, const Gae& options, int64_t row,
                const MutableArray& advantages, const MutableArray& returns, GaeBlock& block) {
  const RowLayout& layout = batch.layout;
  double next_value = 0, next_advantage = 0, lambda_of_gap = options.lambda;
  if (batch.bootstrap) {
    load_block<double>(layout, batch.bootstrap, row, 0, 1, nullptr, block.reward);
    next_value = block.reward[0];
  }
  bool in_response = false;  // not so in the padding after the last token
  for (int64_t end = layout.length(row); end > 0; end -= kBlock) {
    const int64_t column = std::max<int64_t>(0, end - kBlock);
    const int count = static_cast<int>(end - column);
    block.load(batch, row, column, count);
    prefetch_next(batch, advantages, returns, row, column);
    if (!batch.done && !batch.truncated && options.gap == MaskGap::carry) {
      const GaeState next = carried(options.gamma, count, {next_value, next_advantage}, block);
      next_value = next.value;
      next_advantage = next.advantage;
      store(layout, advantages, returns, row, column, count, block);
      continue;
    }
    for (int i = count - 1; i >= 0; --i) {
      block.advantage[i] = block.result[i] = 0;
      if (block.weight[i] == 0) {
        if (!in_response || options.gap == MaskGap::carry) continue;
        next_value *= options.gamma;
        next_advantage *= options.gamma * lambda_of_gap;
        continue;
      }
      in_response = true;
      lambda_of_gap = block.lambda[i];
      if (block.truncated[i] != 0) {
        next_value = block.truncation_value[i];
        next_advantage = 0;
      }
      if (block.done[i] != 0) next_value = next_advantage = 0;
      const double delta = block.reward[i] + options.gamma * next_value - block.value[i];
      next_advantage = delta + options.gamma * block.lambda[i] * next_advantage;
      next_value = block.value[i];
      block.advantage[i] = next_advantage;
      block.result[i] = next_advantage + next_value;
    }
    store(layout, advantages, returns, row, column, count, block);
  }
}

}  // namespace

void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor) {
  const auto function = "generalized_advantage_estimation";
  check_fields(function, options);
  check_inputs(function, batch);
  if (batch.truncated) {
    check_given(function, "truncation_values", batch.layout, batch.truncation_values);
  }
  check_given(function, "advantages", batch.layout, advantages);
  check_array(function, "returns", batch.layout, returns);
  check_weights(function, batch.layout, batch.response_mask);
  if (batch.lambdas) {
    check_numbers(function, "lambdas", batch.layout, batch.lambdas, batch.response_mask, {0, 1});
  }
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    GaeBlock block(options.lambda);
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      gae_of_row(batch, options, row, advantages, returns, block);
    }
  });
}

}  // namespace tether
