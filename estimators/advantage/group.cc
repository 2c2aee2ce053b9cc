#include "estimators/advantage/group.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/fields.h"

namespace tether {
namespace {

void check_options(const GroupAdvantage& options) { check_fields("group_advantage", options); }

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

// Count, mean and sum of squared deviations of the rewards that are there, from the first of them.
// Long double: neither the difference nor the square of two doubles overflows or vanishes.
struct Moments {
  long double first = 0, n = 0, mean = 0, squares = 0;

  long double std() const { return n > 1 ? std::sqrt(squares / (n - 1)) : 0; }
};

template <class T, class At>
Moments moments_of(const T* rewards, int64_t size, At at) {
  Moments out;
  const auto sum = [&](auto term) {
    long double total = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (!std::isnan(rewards[at(i)])) total += term(static_cast<long double>(rewards[at(i)]));
    }
    return total;
  };
  for (int64_t i = size - 1; i >= 0; --i) {
    if (!std::isnan(rewards[at(i)])) out.first = static_cast<long double>(rewards[at(i)]);
  }
  out.n = sum([](long double) { return 1; });
  if (out.n == 0) return out;
  out.mean = sum([&](long double reward) { return reward - out.first; }) / out.n;
  out.squares = sum([&](long double reward) {
    const long double deviation = (reward - out.first) - out.mean;
    return deviation * deviation;
  });
  return out;
}

// The advantages of one group: rewards[at(0)] .. rewards[at(size - 1)].
template <class T, class At>
void advantages_of_group(const T* rewards, int64_t size, At at, const GroupAdvantage& options,
                         long double batch_std, T* advantages) {
  const Moments group = moments_of(rewards, size, at);
  const bool centred = options.baseline != AdvantageBaseline::none;
  long double scale = 1;
  if (options.scale != AdvantageScale::none) {
    const bool own = options.scale == AdvantageScale::group_std;
    const long double denominator = (own ? group.std() : batch_std) + options.epsilon;
    scale = denominator > 0 ? 1 / denominator : 0;
  }
  if (centred && group.squares == 0) scale = 0;
  if (options.baseline == AdvantageBaseline::leave_one_out && group.n > 1) {
    scale *= group.n / (group.n - 1);
  }
  for (int64_t i = 0; i < size; ++i) {
    const auto reward = static_cast<long double>(rewards[at(i)]);
    const long double deviation = centred ? (reward - group.first) - group.mean : reward;
    advantages[at(i)] = std::isnan(rewards[at(i)]) ? T(0) : T(deviation * scale);
  }
}

// Of all rewards, where it is asked for.
template <class T>
long double batch_std(const T* rewards, int64_t count, const GroupAdvantage& options) {
  if (options.scale != AdvantageScale::batch_std) return 0;
  return moments_of(rewards, count, [](int64_t i) { return i; }).std();
}

void check_count(int64_t count) {
  require(count >= 0,
          [&] { return "group_advantage: count must be at least 0, got " + text(count); });
}

}  // namespace

template <class T>
void group_advantage(const T* rewards, int64_t count, int64_t group_size,
                     const GroupAdvantage& options, T* advantages) {
  check_options(options);
  check_count(count);
  require(group_size >= 1, [&] {
    return "group_advantage: group_size must be at least 1, got " + text(group_size);
  });
  require(count % group_size == 0, [&] {
    return "group_advantage: rewards must divide into groups of " + text(group_size) + ", got " +
           text(count) + ". Pass group ids for ragged groups";
  });
  check_rewards(rewards, count, options.nan_reward);
  const long double std = batch_std(rewards, count, options);
  for (int64_t begin = 0; begin < count; begin += group_size) {
    advantages_of_group(
        rewards + begin, group_size, [](int64_t i) { return i; }, options, std, advantages + begin);
  }
}

template <class T>
void group_advantage(const T* rewards, const int64_t* group_ids, int64_t count,
                     const GroupAdvantage& options, T* advantages) {
  check_options(options);
  check_count(count);
  check_rewards(rewards, count, options.nan_reward);
  const long double std = batch_std(rewards, count, options);
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return group_ids[a] < group_ids[b]; });
  const auto at = [&](int64_t i) { return order[static_cast<size_t>(i)]; };
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && group_ids[at(end)] == group_ids[at(begin)]) ++end;
    advantages_of_group(
        rewards, end - begin, [&](int64_t i) { return at(begin + i); }, options, std, advantages);
  }
}

template void group_advantage(const float*, int64_t, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, int64_t, int64_t, const GroupAdvantage&, double*);
template void group_advantage(const float*, const int64_t*, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, const int64_t*, int64_t, const GroupAdvantage&,
                              double*);

}  // namespace tether
