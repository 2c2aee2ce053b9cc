#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../../core/macros.h"
#include "../../core/math.h"
#include "../../core/number.h"
#include "../kl_penalty.h"
#include "token_block.h"
#include "token_rows.h"

// The segments of a row whose tokens share a ratio (rl/level.h), as runs inside its blocks.

namespace tether {

// A sum with what its roundings lost (Neumaier 1974): a token's own part can be taken off again and
// leaves the others', however much smaller they are.
struct CompensatedSum {
  double sum = 0, rest = 0;

  void add(double x) {
    const double next = sum + x;
    rest += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
};

// What the tokens of a segment share.
template <class T>
struct SharedRatio {
  T logp, log_ratio, ratio, ratio_k3;
  T share;      // 1 / n: of a token in the metrics of the ratio
  T kl_weight;  // of a penalty that the ratio weighs, within its bounds

  // In place: a copy of what was just written waits for it.
  void set(double mean_logp, double mean_log_ratio, double n,
           const std::optional<KlWeightBounds>& of_penalty) {
    const T bound = kSaturation<T>;
    logp = narrow(mean_logp, Largest<T>::kInput);
    log_ratio = narrow(mean_log_ratio, Largest<T>::kInput);
    const auto both = math::exp_and_expm1_minus(log_ratio, -bound, bound);
    ratio = both.exp;
    ratio_k3 = both.expm1_minus;
    share = narrow<T>(n > 0 ? 1 / n : 1);
    if (of_penalty) kl_weight = tether::kl_weight(Constant<T>{log_ratio}, *of_penalty).value;
  }
};

// From `begin`, a column of the row, to where the next one begins.
template <class T>
struct RatioSegment {
  int64_t begin = 0;
  double n = 0, logp = 0, log_ratio = 0;  // sums over w
  SharedRatio<T> shared = {};
  // What its tokens add up to: d S / d L, and rho G of a penalty that the same ratio weighs.
  double slope = 0;
  CompensatedSum kl = {};
};

// The first begins at 0.
template <class T>
using RatioSegments = std::vector<RatioSegment<T>>;

// visit(segment, begin, end) for the part of each segment in a block of `size`.
template <class Segment, class Visit>
void for_each_part(std::vector<Segment>& segments, const Place& place, int size, Visit visit) {
  const auto begins_after = [](int64_t column, const auto& each) { return column < each.begin; };
  auto next = std::upper_bound(segments.begin(), segments.end(), place.column, begins_after);
  for (int begin = 0; begin < size;) {
    const bool last = next == segments.end() || next->begin >= place.column + size;
    const int end = last ? size : static_cast<int>(next->begin - place.column);
    visit(*(next - 1), begin, end);
    begin = end;
    if (!last) ++next;
  }
}

// A sum in four chains, side by side: left to itself, GCC takes them apart. A token's chain hangs
// on its place in the row alone, so that masked slots at the ends of a part change no bit.
struct FourChains {
  using Four = double __attribute__((vector_size(32)));
  Four sums = {};

  template <class T>
  TETHER_INLINE void add_four(const T* in) {
    sums += Four{double(in[0]), double(in[1]), double(in[2]), double(in[3])};
  }
  TETHER_INLINE double total() const { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }
};

// Adds a part of each column to its sum.
template <class... T>
TETHER_INLINE void add_part(int begin, int end, std::pair<const T*, FourChains&>... columns) {
  int i = begin;
  const auto add_one = [&] {
    ((columns.second.sums[i % 4] += double(columns.first[i])), ...);
    ++i;
  };
  while (i < end && i % 4 != 0) add_one();
  for (; i + 4 <= end; i += 4) (columns.second.add_four(columns.first + i), ...);
  while (i < end) add_one();
}

template <class T>
TETHER_CLONES double sum_part(const T* column, int begin, int end) {
  FourChains sum;
  add_part(begin, end, std::pair<const T*, FourChains&>(column, sum));
  return sum.total();
}

}  // namespace tether
