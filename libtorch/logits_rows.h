#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <string>

#include "../logits/rows.h"
#include "token_logps_types.h"

// Tensors of logits [..., V] and of ids as logits/rows.h sees them.

namespace tether::detail {

// What a row of statistics occupies in a float64 tensor [N, kStatistics].
inline constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
static_assert(sizeof(RowStatistics) == kStatistics * sizeof(double));

at::Tensor empty_statistics(int64_t rows);
RowStatistics* statistics_of(const at::Tensor& tensor);

// float64 for float64, else float32.
at::ScalarType result_type(const at::Tensor& input);

// The rows of a tensor [..., V]: leading dimensions that lie end to end are one. A vocabulary of 0
// says that more than two are left, which rows cannot express.
ConstLogits rows_of(const at::Tensor& logits);
// The same rows, to be written to.
MutableLogits writable(const at::Tensor& logits);
// `logits` itself or, for the rare layouts that need it, a contiguous copy.
at::Tensor with_rows(const at::Tensor& logits);

// value(row) for every row, in a tensor of these sizes and type.
template <class Value>
at::Tensor from_rows(const at::Tensor& statistics, at::IntArrayRef sizes, at::ScalarType type,
                     Value value) {
  const at::Tensor out = at::empty(sizes, at::dtype(at::kDouble));
  const RowStatistics* rows = statistics_of(statistics);
  double* values = out.data_ptr<double>();
  for (int64_t row = 0; row < out.numel(); ++row) values[row] = value(rows[row]);
  return out.to(type);
}

// TokenLogps::sum_of_squared_p, mean_logits and target_is_largest from the rows of `input`.
void add_statistics(const at::Tensor& statistics, at::IntArrayRef sizes, const RowOptions& options,
                    const at::Tensor& input, TokenLogps& out);

// int32 or int64, like `like` in shape (but its last dimension) and in device.
void check_targets(const std::string& function, const at::Tensor& targets, const std::string& name,
                   const at::Tensor& like);
// targets: int64, contiguous, on the CPU. IndexError with the place of the first that is neither in
// [0, vocabulary) nor ignore_index.
void check_ids(const std::string& function, const at::Tensor& targets, int64_t vocabulary,
               int64_t ignore_index);
// The same of head_ids, where no id is ignored.
void check_head_ids(const std::string& function, const at::Tensor& head_ids, int64_t vocabulary);

}  // namespace tether::detail
