#pragma once

#include <cstdint>
#include <type_traits>

#include "bit_cast.h"
#include "macros.h"

// Selection and bounds without a branch, for vector loops over T = float | double.

namespace tether {

// All ones where a condition holds, else 0.
template <class T>
using Mask = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
TETHER_INLINE Mask<T> mask(bool condition) {
  return -static_cast<Mask<T>>(condition);
}
// The value, or 0.
template <class T>
TETHER_INLINE T keep(Mask<T> where, T value) {
  return bit_cast<T>(where & bit_cast<Mask<T>>(value));
}

// Infinity as the largest number, NaN as it is.
template <class T>
TETHER_INLINE constexpr T bounded(T x, T largest) {
  const T below = largest < x ? largest : x;
  return -largest > below ? -largest : below;
}

// Infinity and NaN as they are.
template <class T>
TETHER_INLINE T saturated(T x, T largest) {
  return x - x == T(0) ? bounded(x, largest) : x;
}

// 0, or NaN if one of them is NaN or infinite.
template <class T>
TETHER_INLINE T zero_or_nan(T a, T b, T c, T d) {
  return (a * T(0) + b * T(0)) + (c * T(0) + d * T(0));
}

}  // namespace tether
