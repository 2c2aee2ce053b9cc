#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "../core/check.h"
#include "../core/half.h"
#include "../core/parallel.h"
#include "final_logit.h"
#include "logits.h"
#include "statistics.h"

// What every pass over rows of logits needs, in the type in which they are stored.

namespace tether::rows {

// Over the columns of 2^t.
inline double sum(const RowStatistics& row) { return 1 + row.rest; }

inline bool is_ignored(const int64_t* targets, int64_t row, const RowOptions& options) {
  return targets != nullptr && targets[row] == options.ignore_index;
}

[[noreturn]] inline void refuse_type(std::string_view function, std::string_view argument,
                                     DType dtype) {
  throw Error(std::string(function) + ": " + std::string(argument) +
              " must be float32, float64, bfloat16 or float16, got " + std::string(name_of(dtype)));
}

// body(Stored{}) for the type of the logits, or an Error about `argument`.
template <class Body>
void with_stored_type(std::string_view function, std::string_view argument, DType dtype,
                      Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    default:
      break;
  }
  refuse_type(function, argument, dtype);
}

template <class Stored, class Byte>
auto* row_of(const BasicLogits<Byte>& logits, int64_t row) {
  using Element = std::conditional_t<std::is_const_v<Byte>, const Stored, Stored>;
  return static_cast<Element*>(logits.data) + logits.offset(row);
}

// A row as a batch of its own.
template <class Byte>
BasicLogits<Byte> lone_row(const BasicLogits<Byte>& logits, int64_t row) {
  using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
  return {.data = static_cast<Char*>(logits.data) + logits.offset(row) * bytes_of(logits.dtype),
          .dtype = logits.dtype,
          .rows = 1,
          .vocabulary = logits.vocabulary,
          .stride = logits.stride};
}

// Larger than what a core's cache would keep for the next reader.
inline bool is_large(const MutableLogits& logits) {
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  return logits.rows * logits.vocabulary * bytes_of(logits.dtype) > kCacheBytes;
}

template <class Stored>
void fill_zero(Stored* row, int64_t vocabulary, int64_t stride) {
  for (int64_t i = 0; i < vocabulary; ++i) row[i * stride] = Stored{};
}

// Throws Error about the options, the targets or the sizes.
void check_rows(std::string_view function, const ConstLogits& logits, const int64_t* targets,
                const RowOptions& options);
// Unless both rows of logits are alike.
void check_pair(std::string_view function, const ConstLogits& q, const ConstLogits& p,
                double temperature);

// body(row) for every row; a row has one owner.
template <class Body>
void for_each_row(const ConstLogits& logits, const Executor& executor, Body body) {
  if (logits.rows == 0) return;
  const Chunks chunks = Chunks::of(logits.rows, logits.rows * logits.vocabulary);
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) body(row);
  });
}

}  // namespace tether::rows
