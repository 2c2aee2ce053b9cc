#pragma once

#include <cstdint>
#include <type_traits>

#include "batch.h"
#include "half.h"
#include "macros.h"
#include "math.h"

// One number of an array at a time, as the threads of a team (team.h) read and write it. T is float
// or double.

namespace tether::cuda {

inline constexpr float kNaN = math::detail::Format<float>::kNaN;

template <class T = float>
TETHER_TEAM T load(const ConstArray& array, int64_t i) {
  switch (array.dtype) {
    case DType::float32:
      return T(static_cast<const float*>(array.data)[i]);
    case DType::bfloat16:
      return T(from_bfloat16(static_cast<const uint16_t*>(array.data)[i]));
    case DType::float16:
      return T(from_float16(static_cast<const uint16_t*>(array.data)[i]));
    case DType::float64:
      return static_cast<T>(static_cast<const double*>(array.data)[i]);
    case DType::boolean:
      return static_cast<const uint8_t*>(array.data)[i] != 0 ? T(1) : T(0);
    default:
      return T(kNaN);
  }
}
template <class T = float>
TETHER_TEAM T load(const RowLayout& layout, const ConstArray& array, int64_t row, int64_t column) {
  return load<T>(array, array.index(layout, row, column));
}

template <class T>
TETHER_TEAM void store(const RowLayout& layout, const MutableArray& array, int64_t row,
                       int64_t column, T value) {
  const int64_t i = array.index(layout, row, column);
  switch (array.dtype) {
    case DType::float32:
      static_cast<float*>(array.data)[i] = static_cast<float>(value);
      break;
    case DType::bfloat16:
      static_cast<uint16_t*>(array.data)[i] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::float16:
      static_cast<uint16_t*>(array.data)[i] = to_float16(static_cast<float>(value));
      break;
    case DType::float64:
      if constexpr (std::is_same_v<T, double>) static_cast<double*>(array.data)[i] = value;
      break;
    default:
      break;
  }
}

// One that check_weights would refuse is NaN.
template <class T = float>
TETHER_TEAM T load_mask(const RowLayout& layout, const ConstArray& mask, int64_t row,
                        int64_t column) {
  const T w = load<T>(layout, mask, row, column);
  const bool legal = w == T(0) || (w >= T(kSmallestWeight) && w <= T(1));
  return legal ? w : T(kNaN);
}

}  // namespace tether::cuda
