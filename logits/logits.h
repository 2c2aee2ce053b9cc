#pragma once

#include <cstdint>
#include <limits>

#include "../core/batch.h"
#include "../core/macros.h"

namespace tether {

// Logits [rows, vocabulary] in somebody else's memory. Row r starts at element
// (r / columns) * batch_stride + (r % columns) * row_stride, which covers slices of [B, T, V];
// strides count elements and may be anything.
template <class Byte>
struct BasicLogits {
  Byte* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0;
  int64_t vocabulary = 0;
  int64_t row_stride = 0;
  int64_t stride = 1;  // from one logit of a row to the next
  int64_t columns = std::numeric_limits<int64_t>::max();
  int64_t batch_stride = 0;

  TETHER_INLINE int64_t offset(int64_t row) const {
    if (row < columns) return row * row_stride;
    return row / columns * batch_stride + row % columns * row_stride;
  }
};

using ConstLogits = BasicLogits<const void>;
using MutableLogits = BasicLogits<void>;

// The layout of logits [..., V], given sizes and strides of `dimensions` >= 1: leading dimensions
// that lie end to end are one. A vocabulary of 0 says that more than two are left, which rows
// cannot express. Memory and type are the caller's to fill in.
ConstLogits strided_rows(const int64_t* sizes, const int64_t* strides, int64_t dimensions);

}  // namespace tether
