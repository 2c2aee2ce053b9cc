#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "face/arguments.h"
#include "logits/pair_kl.h"
#include "logits/rows.h"
#include "logits/support.h"
#include "python/stable.h"

// Tensors as rows of logits and what belongs to rows, for the operators on them. A direct call of
// an operator stays inside its memory.

namespace tether::python {

// Numbers of a row in a float64 tensor [N, ...].
inline constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
inline constexpr int64_t kKlStatistics = sizeof(KlStatistics) / sizeof(double);  // of two

inline ConstLogits layout_of(std::string_view function, std::string_view name,
                             const Tensor& logits) {
  require(logits.dim() >= 1 && logits.size(-1) >= 1, [&] {
    return std::string(function) + ": " + std::string(name) + " must be [..., V] with V at least 1";
  });
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    sizes.push_back(logits.size(d));
    strides.push_back(logits.stride(d));
  }
  ConstLogits rows = strided_rows(sizes.data(), strides.data(), logits.dim());
  rows.dtype = dtype_of(logits.scalar_type());
  require(is_floating(rows.dtype),
          [&] { return named(function, name) + " must be a floating-point tensor"; });
  return rows;
}

// The rows of the logits or, for the rare layouts that need it, of a copy, which `owner` holds.
inline ConstLogits rows_of(std::string_view function, std::string_view name, const Tensor& logits,
                           Tensor& owner) {
  const bool express = layout_of(function, name, logits).vocabulary != 0;
  owner = express ? logits : torch::stable::contiguous(logits);
  ConstLogits rows = layout_of(function, name, owner);
  rows.data = owner.const_data_ptr();
  return rows;
}

// Rows for the gradient of `logits`.
inline MutableLogits writable(std::string_view function, const Tensor& dlogits,
                              const Tensor& logits) {
  const ConstLogits rows = layout_of(function, "dlogits", dlogits);
  require(face::same_shape(dlogits, logits) && dlogits.scalar_type() == logits.scalar_type() &&
              rows.vocabulary != 0,
          [&] { return std::string(function) + ": dlogits must be like logits, in rows"; });
  return {dlogits.mutable_data_ptr(),
          rows.dtype,
          rows.rows,
          rows.vocabulary,
          rows.row_stride,
          rows.stride,
          rows.columns,
          rows.batch_stride};
}

inline int64_t count_of_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) rows *= logits.size(d);
  return rows;
}

inline const int64_t* ids_of(std::string_view function, std::string_view name, const Tensor& ids,
                             int64_t count) {
  return numbers_of<const int64_t>(function, name, ids, count);
}

// The ids [rows] of a call in its own name.
inline const int64_t* targets_of(std::string_view function, const Tensor& targets,
                                 const ConstLogits& logits, const RowOptions& options) {
  const int64_t* ids = ids_of(function, "targets", targets, logits.rows);
  const int64_t vocabulary = options.ids > 0 ? options.ids : logits.vocabulary;
  const int64_t bad = first_bad_target(ids, logits.rows, vocabulary, options.ignore_index);
  require(bad == logits.rows, [&] {
    return named(function, "targets") + " must be in [0, " + text(vocabulary) +
           ") or ignore_index " + text(options.ignore_index) + ", got " + text(ids[bad]) + " at " +
           in_brackets(text(bad));
  });
  return ids;
}

// A support: ids [N, K] in int64, contiguous, padded with -1.
inline std::optional<KeptIds> kept_ids(std::string_view function,
                                       const std::optional<Tensor>& support, int64_t rows) {
  if (!support) return {};
  require(support->dim() >= 1, [&] { return named(function, "support") + " must be [N, K]"; });
  const int64_t size = support->size(-1);
  return KeptIds{{.rows = rows, .columns = size},
                 {ids_of(function, "support", *support, rows * size), DType::int64, size, 1}};
}

// The statistics of `rows` rows.
template <class Row>
Row* rows_in(std::string_view function, const Tensor& statistics, int64_t rows) {
  constexpr int64_t kNumbers = sizeof(Row) / sizeof(double);
  numbers_of<const double>(function, "statistics", statistics, rows * kNumbers);
  return static_cast<Row*>(statistics.mutable_data_ptr());
}

// value(row) for each row of the logits: float64 for float64 logits, else float32.
template <class Row, class Value>
Tensor from_rows(const Row* rows, const Tensor& logits, Value value) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) sizes.push_back(logits.size(d));
  const Tensor out = empty(sizes, wide ? ScalarType::Double : ScalarType::Float);
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (wide) {
      static_cast<double*>(out.mutable_data_ptr())[i] = value(rows[i]);
    } else {
      static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(value(rows[i]));
    }
  }
  return out;
}

inline const double* numbers_or_none(std::string_view function, std::string_view name,
                                     const std::optional<Tensor>& tensor, int64_t count) {
  return tensor ? numbers_of<const double>(function, name, *tensor, count) : nullptr;
}

// What was not asked for is NaN, which opcheck and detectors of NaN would find in the output.
inline void clear_unasked(RowSums asked, RowStatistics* rows, int64_t count) {
  for (RowStatistics* row = rows; row < rows + count; ++row) {
    if (asked == RowSums::logp) row->weighted_sum = 0;
    if (asked != RowSums::all) {
      row->sum_of_squares = row->logit_sum = row->columns = row->max_logit = 0;
    }
  }
}

}  // namespace tether::python
