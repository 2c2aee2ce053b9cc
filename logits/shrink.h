#pragma once

#include <cstdint>

#include "../core/bit_cast.h"
#include "../core/macros.h"
#include "../core/select.h"

namespace tether::rows {

// The power of two that brings a size within a bound. 1 where it is, and for infinity and NaN,
// which nothing brings there. What is multiplied by it loses no digit.
template <class Real>
TETHER_INLINE Real shrink_to(Real size, Real bound) {
  constexpr int kDigits = sizeof(Real) == sizeof(double) ? 52 : 23;
  constexpr Mask<Real> kBias = sizeof(Real) == sizeof(double) ? 1023 : 127;
  const Real excess = size / bound;
  const Mask<Real> exponent = bit_cast<Mask<Real>>(excess) >> kDigits;
  const bool shrinks = excess > 1 && exponent <= 2 * kBias;
  return shrinks ? bit_cast<Real>((2 * kBias - 1 - exponent) << kDigits) : 1;
}

}  // namespace tether::rows
