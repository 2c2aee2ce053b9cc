#pragma once

#include <limits>

#include "../../core/macros.h"
#include "../../core/select.h"

namespace tether {

// Finite inputs give finite results: beyond these bounds a number counts as the bound, so that
// neither a difference of infinities nor 0 times one makes NaN of it. The square of a
// log-probability, an advantage times it or the largest ratio, and a value's square are still of
// the type.
template <class T>
struct Largest {
  static constexpr T kResult = T(1e300), kLogp = T(1e130), kAdvantage = T(1e40), kWeight = T(1e40),
                     kValue = T(1e140);
};
template <>
struct Largest<float> {
  static constexpr float kResult = std::numeric_limits<float>::max(), kLogp = 1e14f,
                         kAdvantage = 1e12f, kWeight = 1e12f, kValue = 1e18f;
};

// Of a result.
template <class T>
TETHER_INLINE T bounded(T x) {
  return bounded(x, Largest<T>::kResult);
}
// Of an input: infinity as it is.
template <class T>
TETHER_INLINE T saturated(T x, T largest) {
  return x - x == T(0) ? bounded(x, largest) : x;
}
// A sum in double as a number of a block.
template <class T>
TETHER_INLINE T narrow(double x, T largest = Largest<T>::kResult) {
  return T(saturated(x, double(largest)));
}

}  // namespace tether
