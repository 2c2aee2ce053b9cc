#include "estimators/advantage.h"

#include <algorithm>
#include <string_view>

#include "core/check.h"
#include "core/fields.h"

namespace tether {

void discounted_returns(const RowLayout& layout, const ConstArray& rewards,
                        const ConstArray& response_mask, const ConstArray& bootstrap,
                        const DiscountedReturns& options, const MutableArray& returns) {
  const auto function = "discounted_returns";
  check_range(function, "gamma", options.gamma, Range{0, 1});
  check_layout(function, layout);
  check_given(function, "rewards", layout, rewards);
  check_given(function, "response_mask", layout, response_mask);
  check_array(function, "bootstrap", layout, bootstrap);
  check_given(function, "returns", layout, returns);
  double weight[kBlock], reward[kBlock], out[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    double next = 0;
    bool in_response = false;  // not so in the padding after the last token
    if (bootstrap) {
      load_block<double>(layout, bootstrap, row, 0, 1, nullptr, out);
      next = out[0];
    }
    const int64_t length = layout.length(row);
    for (int64_t end = length; end > 0; end -= kBlock) {
      const int64_t column = std::max<int64_t>(0, end - kBlock);
      const int count = static_cast<int>(end - column);
      load_block<double>(layout, response_mask, row, column, count, nullptr, weight);
      load_block<double>(layout, rewards, row, column, count, weight, reward);
      for (int i = count - 1; i >= 0; --i) {
        const bool token = weight[i] != 0;
        in_response |= token;
        const bool step = token || (in_response && options.gap == MaskGap::decay);
        if (step) next = reward[i] + options.gamma * next;
        out[i] = token ? next : 0;
      }
      store_block<double>(layout, returns, row, column, count, out);
    }
  }
}

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
    store_block(layout, advantages, row, column, count, block.advantage);
    if (returns) store_block(layout, returns, row, column, count, block.result);
  }
}

}  // namespace

void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor) {
  const auto function = "generalized_advantage_estimation";
  check_range(function, "gamma", options.gamma, Range{0, 1});
  check_range(function, "lambda", options.lambda, Range{0, 1});
  check_layout(function, batch.layout);
  const auto given = [&](std::string_view name, const auto& array) {
    check_given(function, name, batch.layout, array);
  };
  given("rewards", batch.rewards);
  given("values", batch.values);
  given("response_mask", batch.response_mask);
  given("advantages", advantages);
  if (batch.truncated) given("truncation_values", batch.truncation_values);
  const auto check = [&](std::string_view name, const auto& array) {
    check_array(function, name, batch.layout, array);
  };
  check("bootstrap", batch.bootstrap);
  check("done", batch.done);
  check("truncated", batch.truncated);
  check("lambdas", batch.lambdas);
  check("returns", returns);
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    GaeBlock block(options.lambda);
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      gae_of_row(batch, options, row, advantages, returns, block);
    }
  });
}

}  // namespace tether
