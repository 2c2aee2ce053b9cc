#pragma once

#include "../../core/macros.h"
#include "../../core/select.h"

namespace tether {

// Finite inputs give finite results: beyond these bounds a number counts as the bound, so that
// neither a difference of infinities nor 0 times one makes NaN of it. The square of an input, and
// an advantage times its ratio, are still of the type.
template <class T>
struct Largest {
  static constexpr T kResult = T(1e300), kInput = T(1e140), kOfRatio = T(1e300), kWeight = T(1e40);
};
template <>
struct Largest<float> {
  // The largest bfloat16, which gradients are stored in.
  static constexpr float kResult = 0x1.fep127f, kInput = 1e18f, kOfRatio = 3e38f, kWeight = 1e12f;
};

// Of a result.
template <class T>
TETHER_INLINE T bounded(T x) {
  return bounded(x, Largest<T>::kResult);
}
// An advantage, as a surrogate sees it beside its ratio.
template <class T>
TETHER_INLINE T beside_ratio(T advantage, T ratio) {
  const T largest = Largest<T>::kOfRatio / ratio;
  return saturated(advantage, largest < Largest<T>::kInput ? largest : Largest<T>::kInput);
}
// A sum in double as a number of a block.
template <class T>
TETHER_INLINE T narrow(double x, T largest = Largest<T>::kResult) {
  return T(saturated(x, double(largest)));
}
// Whether narrow changes it.
template <class T>
TETHER_INLINE bool is_beyond(double x) {
  return x > double(Largest<T>::kResult) || x < -double(Largest<T>::kResult);
}

}  // namespace tether
