#pragma once

#include <cstdint>
#include <type_traits>

#include "bit_cast.h"
#include "macros.h"

// bfloat16 and float16 as bits, to and from float: exact on the way in, rounded to nearest even on
// the way out, NaN stays NaN. Branch-free, for use inside vector loops.

namespace tether {

TETHER_INLINE float from_bfloat16(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

TETHER_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

TETHER_INLINE float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  // The exponent bias differs by 112; subnormals come out right because the product is exact.
  const float finite = bit_cast<float>(shifted) * 0x1p112f;
  const bool special = (bits & 0x7C00u) == 0x7C00u;
  const uint32_t magnitude = special ? (shifted | 0x7F800000u) : bit_cast<uint32_t>(finite);
  return bit_cast<float>(sign | magnitude);
}

TETHER_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rebias the exponent and round the 13 lost bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 makes the float unit itself round at 2^-24.
  const float sum = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(sum) - 0x3F000000u;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477FF000u ? 0x7C00u : out;  // rounds to 65536 or beyond
  out = magnitude > 0x7F800000u ? 0x7E00u : out;
  return static_cast<uint16_t>(sign | out);
}

// As elements of arrays.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T, class Stored>
TETHER_INLINE T widened(Stored stored) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return T(from_bfloat16(stored.bits));
  } else if constexpr (std::is_same_v<Stored, Float16>) {
    return T(from_float16(stored.bits));
  } else {
    return T(stored);
  }
}

template <class Stored, class T>
TETHER_INLINE Stored narrowed(T value) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return {to_bfloat16(float(value))};
  } else if constexpr (std::is_same_v<Stored, Float16>) {
    return {to_float16(float(value))};
  } else {
    return Stored(value);
  }
}

}  // namespace tether
