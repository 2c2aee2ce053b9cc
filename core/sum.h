#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "bit_cast.h"
#include "macros.h"

namespace tether {

// Sums in one fixed order, whatever the instruction set or the number of threads: element i goes to
// lane i mod 16, lanes are added pairwise. Partial sums are kept in double.
inline constexpr int kLanes = 16;

// `count` elements, filled up to whole lanes.
template <class Int>
constexpr Int whole_lanes(Int count, Int lanes = kLanes) {
  return (count + lanes - 1) / lanes * lanes;
}

struct LaneSum {
  double lane[kLanes] = {};

  // Adds the lanes of a block.
  template <class T>
  TETHER_INLINE void add(const T* sums) {
    for (int i = 0; i < kLanes; ++i) lane[i] += double(sums[i]);
  }
  double total() const {
    double eight[8], four[4];
    for (int i = 0; i < 8; ++i) eight[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
  // The total since the last call.
  double take() {
    const double sum = total();
    for (double& each : lane) each = 0;
    return sum;
  }
};

// The largest number; -inf before the first.
struct LaneMax {
  double lane[kLanes];

  LaneMax() {
    for (double& each : lane) each = -std::numeric_limits<double>::infinity();
  }
  template <class T>
  TETHER_INLINE void add(const T* largest) {
    for (int i = 0; i < kLanes; ++i) {
      const double candidate = double(largest[i]);
      lane[i] = candidate > lane[i] ? candidate : lane[i];
    }
  }
  double total() const {
    double out = lane[0];
    for (double each : lane) out = each > out ? each : out;
    return out;
  }
};

// Numbers as integers in the same order, and back: a vector loop can keep the largest integer of a
// lane in a register, not the largest number.
template <class T>
using Order = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

namespace detail {
template <class T>
TETHER_INLINE constexpr Order<T> flipped(Order<T> bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Order<T>>::max());
}
}  // namespace detail

template <class T>
TETHER_INLINE constexpr Order<T> order_of(T value) {
  return detail::flipped<T>(bit_cast<Order<T>>(value));
}
template <class T>
TETHER_INLINE constexpr T in_order(Order<T> order) {
  return bit_cast<T>(detail::flipped<T>(order));
}

}  // namespace tether
