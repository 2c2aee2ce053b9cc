#include "estimators/advantage.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/fields.h"

namespace tether {
namespace {

void check_options(const GroupAdvantage& options) {
  check_range("group_advantage", "epsilon", options.epsilon, Range{0, infinity});
}

template <class T>
void check_rewards(const T* rewards, int64_t count, NanReward rule) {
  for (int64_t i = 0; i < count; ++i) {
    const bool legal =
        std::isfinite(rewards[i]) || (std::isnan(rewards[i]) && rule == NanReward::missing);
    require(legal, [&] {
      return "group_advantage: rewards must be finite, got " + text(rewards[i]) + " at [" +
             text(i) + "]" +
             (std::isnan(rewards[i]) ? ". Pass nan_reward = missing to leave it out of its group"
                                     : "");
    });
  }
}

// The advantages of one group: rewards[at(0)] .. rewards[at(size - 1)].
template <class T, class At>
void advantages_of_group(const T* rewards, int64_t size, At at, const GroupAdvantage& options,
                         T* advantages) {
  double first = NAN;
  for (int64_t i = size - 1; i >= 0; --i) {
    if (!std::isnan(rewards[at(i)])) first = double(rewards[at(i)]);
  }
  const auto deviation = [&](int64_t i) { return double(rewards[at(i)]) - first; };
  double n = 0, sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (std::isnan(rewards[at(i)])) continue;
    n += 1;
    sum += deviation(i);
  }
  const double mean = n > 0 ? sum / n : 0;
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isnan(rewards[at(i)])) squares += (deviation(i) - mean) * (deviation(i) - mean);
  }
  const double deviation_std = n > 1 ? std::sqrt(squares / (n - 1)) : 0;
  double scale = 1;
  if (options.scale == AdvantageScale::group_std) {
    scale = deviation_std > 0 ? 1 / (deviation_std + options.epsilon) : 0;
  }
  for (int64_t i = 0; i < size; ++i) {
    const bool missing = std::isnan(rewards[at(i)]);
    advantages[at(i)] = missing ? T(0) : T((deviation(i) - mean) * scale);
  }
}

}  // namespace

template <class T>
void group_advantage(const T* rewards, int64_t count, int64_t group_size,
                     const GroupAdvantage& options, T* advantages) {
  check_options(options);
  require(group_size >= 1, [&] {
    return "group_advantage: group_size must be at least 1, got " + text(group_size);
  });
  require(count % group_size == 0, [&] {
    return "group_advantage: rewards must divide into groups of " + text(group_size) + ", got " +
           text(count) + ". Pass group ids for ragged groups";
  });
  check_rewards(rewards, count, options.nan_reward);
  for (int64_t begin = 0; begin < count; begin += group_size) {
    advantages_of_group(
        rewards + begin, group_size, [](int64_t i) { return i; }, options, advantages + begin);
  }
}

template <class T>
void group_advantage(const T* rewards, const int64_t* group_ids, int64_t count,
                     const GroupAdvantage& options, T* advantages) {
  check_options(options);
  check_rewards(rewards, count, options.nan_reward);
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return group_ids[a] < group_ids[b]; });
  const auto at = [&](int64_t i) { return order[static_cast<size_t>(i)]; };
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && group_ids[at(end)] == group_ids[at(begin)]) ++end;
    advantages_of_group(
        rewards, end - begin, [&](int64_t i) { return at(begin + i); }, options, advantages);
  }
}

template void group_advantage(const float*, int64_t, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, int64_t, int64_t, const GroupAdvantage&, double*);
template void group_advantage(const float*, const int64_t*, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, const int64_t*, int64_t, const GroupAdvantage&,
                              double*);

void discounted_returns(const RowLayout& layout, const ConstArray& rewards,
                        const ConstArray& response_mask, const ConstArray& bootstrap,
                        const DiscountedReturns& options, const MutableArray& returns) {
  const auto function = "discounted_returns";
  check_range(function, "gamma", options.gamma, Range{0, 1});
  check_offsets(function, layout);
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

}  // namespace tether
