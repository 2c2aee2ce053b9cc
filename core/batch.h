#pragma once

#include <cstdint>
#include <limits>
#include <string_view>

#include "fields.h"
#include "macros.h"
#include "select.h"

namespace tether {

// Numbers in somebody else's memory. Arithmetic is in float, in double for float64. `none` is the
// type of an array that is absent; an empty one has a type, and perhaps no memory. Integers are
// ids.
enum class DType : uint8_t { none, float32, float64, bfloat16, float16, boolean, int32, int64 };

constexpr bool is_floating(DType dtype) {
  return dtype >= DType::float32 && dtype <= DType::float16;
}
constexpr bool is_integer(DType dtype) { return dtype >= DType::int32; }

constexpr std::string_view name_of(DType dtype) {
  constexpr std::string_view kNames[] = {"none",    "float32", "float64", "bfloat16",
                                         "float16", "boolean", "int32",   "int64"};
  return kNames[static_cast<uint8_t>(dtype)];
}

// The shape of a batch of token rows: padded [rows, columns], or packed end to end, row i being the
// elements offsets[i] .. offsets[i + 1] (cu_seqlens). Sizes are int64 throughout.
struct RowLayout {
  int64_t rows = 0;
  int64_t columns = 0;                 // padded only
  const int32_t* offsets32 = nullptr;  // packed: one of the two, [rows + 1]
  const int64_t* offsets64 = nullptr;

  TETHER_INLINE bool packed() const { return offsets32 != nullptr || offsets64 != nullptr; }
  TETHER_INLINE int64_t offset(int64_t row) const {
    return offsets32 ? offsets32[row] : offsets64[row];
  }
  TETHER_INLINE int64_t length(int64_t row) const {
    return packed() ? offset(row + 1) - offset(row) : columns;
  }
  int64_t elements() const {
    if (!packed()) return rows * columns;
    return rows == 0 ? 0 : offset(rows) - offset(0);
  }
};

// One array of a batch: a value per token, or one per row that all its tokens share. Strides count
// elements; any are legal, 0 too. A packed array of tokens has no row stride.
template <class Byte>
struct BasicArray {
  Byte* data = nullptr;
  DType dtype = DType::none;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  bool per_row = false;

  TETHER_INLINE explicit operator bool() const { return dtype != DType::none; }
  // The element index of token `column` of `row`.
  TETHER_INLINE int64_t index(const RowLayout& layout, int64_t row, int64_t column) const {
    if (per_row) return row * row_stride;
    if (layout.packed()) return (layout.offset(row) + column) * column_stride;
    return row * row_stride + column * column_stride;
  }
};

using ConstArray = BasicArray<const void>;
using MutableArray = BasicArray<void>;

// What a public door asks of its arrays, in words that begin with `function`: sizes are not
// negative and offsets do not decrease; an array has a type and, unless it is empty, memory; one
// that is written to has a floating-point type; a given one is not absent.
void check_layout(std::string_view function, const RowLayout& layout);
template <class Array>
void check_array(std::string_view function, std::string_view name, const RowLayout& layout,
                 const Array& array);
template <class Array>
void check_given(std::string_view function, std::string_view name, const RowLayout& layout,
                 const Array& array);

// Below it the inverse of a weight, as of a row's, is no float.
inline constexpr double kSmallestWeight = 0x1p-126;

// Throws for the first weight that is not in [0, 1], or so small that its inverse is no number.
void check_weights(std::string_view function, const RowLayout& layout, const ConstArray& mask,
                   std::string_view name = "response_mask");
// Throws for the first number at an active slot that is not in the range.
void check_numbers(std::string_view function, std::string_view name, const RowLayout& layout,
                   const ConstArray& array, const ConstArray& response_mask, const Range& range);

// Kernels work on blocks of this many tokens, which stay in the first-level cache. A block is
// filled up to a multiple of kLanes with zeros of weight 0.
inline constexpr int kBlock = 256;

// Throws for the first id at an active slot that is smaller than the one before it in its row.
void check_ascending(std::string_view function, std::string_view name, const RowLayout& layout,
                     const ConstArray& ids, const ConstArray& response_mask);

// `count` tokens of `row`, from `column` on, widened to T. With weights, slots of weight 0 are not
// looked at and come out as 0, whatever they hold.
template <class T>
void load_block(const RowLayout& layout, const ConstArray& array, int64_t row, int64_t column,
                int count, const T* weights, T* out);

// The reverse; rounds once, to nearest even.
template <class T>
void store_block(const RowLayout& layout, const MutableArray& array, int64_t row, int64_t column,
                 int count, const T* values);

constexpr int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::boolean:
      return 1;
    case DType::none:
      break;
  }
  return 0;
}

// A number of float32 or float64: beyond the type its largest one, NaN as it is.
constexpr double representable(double value, DType dtype) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  if (dtype == DType::float64) return value;
  return bounded(value, kLargest);
}

// Asks memory for a block that is wanted soon, so that it comes while another is worked on. Inline:
// GCC takes calls of a function that does nothing else for calls that do nothing.
template <class Byte>
TETHER_INLINE void prefetch_block(const RowLayout& layout, const BasicArray<Byte>& array,
                                  int64_t row, int64_t column, int count) {
  if (array.per_row || array.column_stride != 1) return;
  constexpr int64_t kLine = 64;
  const int64_t bytes = bytes_of(array.dtype);
  const auto* begin =
      static_cast<const char*>(array.data) + array.index(layout, row, column) * bytes;
  for (int64_t i = 0; i < count * bytes; i += kLine) __builtin_prefetch(begin + i);
}

}  // namespace tether
