#include "core/batch.h"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/half.h"
#include "core/macros.h"
#include "core/sum.h"

namespace tether {
namespace {

// A boolean is any byte but 0.
template <class T, class Stored>
TETHER_INLINE T loaded(Stored stored) {
  if constexpr (std::is_same_v<Stored, uint8_t>) {
    return stored != 0 ? T(1) : T(0);
  } else {
    return widened<T>(stored);
  }
}

template <class T, class Stored>
TETHER_CLONES void load_contiguous(const Stored* in, int count, T* out) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) out[i] = loaded<T>(in[i]);  // VECTOR
}

template <class T, class Stored>
TETHER_CLONES void load_selected(const Stored* in, const T* weights, int count, T* out) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {  // VECTOR
    const T value = loaded<T>(in[i]);
    out[i] = weights[i] != T(0) ? value : T(0);
  }
}

// One number for every token.
template <class T>
TETHER_CLONES void load_shared(T value, const T* weights, int count, T* out) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) out[i] = weights[i] != T(0) ? value : T(0);  // VECTOR
}

template <class T, class Stored>
void load(const Stored* in, int64_t stride, int count, const T* weights, T* out) {
  if (stride == 1 && weights != nullptr) {
    load_selected(in, weights, count, out);
  } else if (stride == 0 && weights != nullptr) {
    load_shared(loaded<T>(in[0]), weights, count, out);
  } else if (stride == 1) {
    load_contiguous(in, count, out);
  } else {
    for (int i = 0; i < count; ++i) {
      const T value = loaded<T>(in[i * stride]);
      out[i] = weights == nullptr || weights[i] != T(0) ? value : T(0);
    }
  }
}

template <class Stored, class T>
TETHER_CLONES void store_contiguous(Stored* out, int count, const T* values) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) out[i] = narrowed<Stored>(values[i]);  // VECTOR
}

template <class Stored, class T>
void store(Stored* out, int64_t stride, int count, const T* values) {
  if (stride == 1) {
    store_contiguous(out, count, values);
  } else {
    for (int i = 0; i < count; ++i) out[i * stride] = narrowed<Stored>(values[i]);
  }
}

}  // namespace

void check_layout(std::string_view function, const RowLayout& layout) {
  require(layout.rows >= 0 && (layout.packed() || layout.columns >= 0), [&] {
    return std::string(function) + ": rows and columns must be at least 0, got " +
           text(layout.rows) + " and " + text(layout.columns);
  });
  require(!layout.packed() || layout.offset(0) >= 0, [&] {
    return std::string(function) + ": offsets must be at least 0, got " + text(layout.offset(0)) +
           " at [0]";
  });
  for (int64_t row = 0; layout.packed() && row < layout.rows; ++row) {
    require(layout.offset(row) <= layout.offset(row + 1), [&] {
      return std::string(function) + ": offsets must not decrease, got " +
             text(layout.offset(row + 1)) + " after " + text(layout.offset(row)) + " at [" +
             text(row + 1) + "]";
    });
  }
}

template <class Array>
void check_array(std::string_view function, std::string_view name, const RowLayout& layout,
                 const Array& array) {
  require(array.dtype != DType::none || array.data == nullptr, [&] {
    return std::string(function) + ": " + std::string(name) + " must have a dtype, got none";
  });
  require(!array || array.data != nullptr || layout.elements() == 0, [&] {
    return std::string(function) + ": " + std::string(name) + " must point to " +
           text(layout.elements()) + " elements, got null";
  });
  require(std::is_same_v<Array, ConstArray> || !array || is_floating(array.dtype), [&] {
    return std::string(function) + ": " + std::string(name) +
           " must be float32, float64, bfloat16 or float16, got " +
           std::string(name_of(array.dtype));
  });
}

template <class Array>
void check_given(std::string_view function, std::string_view name, const RowLayout& layout,
                 const Array& array) {
  check_array(function, name, layout, array);
  require(bool(array), [&] {
    return std::string(function) + ": " + std::string(name) + " must be given, got none";
  });
}

namespace {

// "[row, column]", or the place in a packed array.
std::string place_text(const RowLayout& layout, const ConstArray& array, int64_t row,
                       int64_t column) {
  if (array.per_row) return in_brackets(text(row));
  if (layout.packed()) return in_brackets(text(layout.offset(row) + column));
  return in_brackets(text(row) + ", " + text(column));
}

bool is_weight(double weight) { return (weight >= kSmallestWeight && weight <= 1) || weight == 0; }

// How many of a padded block are no weights.
TETHER_CLONES int64_t count_others(const double* weight, int size) {
  int64_t others = 0;
  for (int i = 0; i < size; ++i) {  // VECTOR
    const int64_t inside = int64_t(weight[i] >= kSmallestWeight) & int64_t(weight[i] <= 1);
    others += 1 - (inside | int64_t(weight[i] == 0));
  }
  return others;
}

bool are_weights(const RowLayout& layout, const ConstArray& array) {
  double weight[kBlock];
  int64_t others = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t length = layout.length(row);
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      load_block<double>(layout, array, row, column, count, nullptr, weight);
      others += count_others(weight, whole_lanes(count));
    }
  }
  return others == 0;
}

// The first number of `array` at an active slot that is not legal(number) goes to report(number,
// place). Without weights every slot is active.
template <class Legal, class Report>
void check_each(const RowLayout& layout, const ConstArray& array, const ConstArray& weights,
                Legal legal, Report report) {
  double active[kBlock], number[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t length = layout.length(row);
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      std::fill_n(active, kBlock, 1.0);
      if (weights) load_block<double>(layout, weights, row, column, count, nullptr, active);
      load_block<double>(layout, array, row, column, count, active, number);
      int bad = 0;
      for (int i = 0; i < count; ++i) bad += active[i] != 0 && !legal(number[i]);
      for (int i = 0; bad > 0 && i < count; ++i) {
        if (active[i] == 0 || legal(number[i])) continue;
        report(number[i], place_text(layout, array, row, column + i));
      }
    }
  }
}

}  // namespace

void check_weights(std::string_view function, const RowLayout& layout, const ConstArray& mask,
                   std::string_view name) {
  if (mask.dtype == DType::boolean || are_weights(layout, mask)) return;
  check_each(layout, mask, {}, is_weight, [&](double weight, const std::string& place) {
    const bool tiny = weight > 0 && weight < kSmallestWeight;
    throw Error(named(function, name) + " must be " +
                (tiny ? "0 or at least " + text(kSmallestWeight) : text(Range{0, 1})) + ", got " +
                text(weight) + " at " + place);
  });
}

void check_numbers(std::string_view function, std::string_view name, const RowLayout& layout,
                   const ConstArray& array, const ConstArray& response_mask, const Range& range) {
  check_each(
      layout, array, response_mask, [&](double number) { return range.contains(number); },
      [&](double number, const std::string& place) {
        throw Error(named(function, name) + " must be " + text(range) + ", got " + text(number) +
                    " at " + place);
      });
}

void check_ascending(std::string_view function, std::string_view name, const RowLayout& layout,
                     const ConstArray& ids, const ConstArray& response_mask) {
  for (int64_t row = 0; row < layout.rows; ++row) {
    int64_t before = std::numeric_limits<int64_t>::min();
    for (int64_t column = 0; column < layout.length(row); ++column) {
      double weight[kLanes];
      load_block<double>(layout, response_mask, row, column, 1, nullptr, weight);
      if (weight[0] == 0) continue;
      const int64_t at = ids.index(layout, row, column);
      const int64_t id = ids.dtype == DType::int32 ? static_cast<const int32_t*>(ids.data)[at]
                                                   : static_cast<const int64_t*>(ids.data)[at];
      require(before <= id, [&] {
        return named(function, name) + " must not decrease along a row, got " + text(id) +
               " after " + text(before) + " at " + place_text(layout, ids, row, column);
      });
      before = id;
    }
  }
}

template <class T>
void load_block(const RowLayout& layout, const ConstArray& array, int64_t row, int64_t column,
                int count, const T* weights, T* out) {
  const int64_t first = array.index(layout, row, column);
  const int64_t stride = array.per_row ? 0 : array.column_stride;
  const auto from = [&](auto* typed) { load(typed + first, stride, count, weights, out); };
  switch (array.dtype) {
    case DType::float32:
      from(static_cast<const float*>(array.data));
      break;
    case DType::float64:
      from(static_cast<const double*>(array.data));
      break;
    case DType::bfloat16:
      from(static_cast<const BFloat16*>(array.data));
      break;
    case DType::float16:
      from(static_cast<const Float16*>(array.data));
      break;
    case DType::boolean:
      from(static_cast<const uint8_t*>(array.data));
      break;
    case DType::int32:  // ids
    case DType::int64:
    case DType::none:
      break;
  }
  for (int i = count; i % kLanes != 0; ++i) out[i] = T(0);
}

template <class T>
void store_block(const RowLayout& layout, const MutableArray& array, int64_t row, int64_t column,
                 int count, const T* values) {
  const int64_t first = array.index(layout, row, column);
  const int64_t stride = array.column_stride;
  const auto to = [&](auto* typed) { store(typed + first, stride, count, values); };
  switch (array.dtype) {
    case DType::float32:
      to(static_cast<float*>(array.data));
      break;
    case DType::float64:
      to(static_cast<double*>(array.data));
      break;
    case DType::bfloat16:
      to(static_cast<BFloat16*>(array.data));
      break;
    case DType::float16:
      to(static_cast<Float16*>(array.data));
      break;
    case DType::boolean:  // input types only
    case DType::int32:
    case DType::int64:
    case DType::none:
      break;
  }
}

template void check_array(std::string_view, std::string_view, const RowLayout&, const ConstArray&);
template void check_array(std::string_view, std::string_view, const RowLayout&,
                          const MutableArray&);
template void check_given(std::string_view, std::string_view, const RowLayout&, const ConstArray&);
template void check_given(std::string_view, std::string_view, const RowLayout&,
                          const MutableArray&);
template void load_block(const RowLayout&, const ConstArray&, int64_t, int64_t, int, const float*,
                         float*);
template void load_block(const RowLayout&, const ConstArray&, int64_t, int64_t, int, const double*,
                         double*);
template void store_block(const RowLayout&, const MutableArray&, int64_t, int64_t, int,
                          const float*);
template void store_block(const RowLayout&, const MutableArray&, int64_t, int64_t, int,
                          const double*);

}  // namespace tether
