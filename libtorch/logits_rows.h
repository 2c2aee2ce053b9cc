#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "../logits/rows.h"
#include "../logits/support.h"
#include "token_logps_types.h"

// Tensors of logits [..., V] and of ids as logits/rows.h sees them.

namespace tether::detail {

// What a row of statistics occupies in a float64 tensor [N, kStatistics].
inline constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
static_assert(sizeof(RowStatistics) == kStatistics * sizeof(double));

at::Tensor empty_statistics(int64_t rows);
RowStatistics* statistics_of(const at::Tensor& tensor);

struct CudaKernels;
// Those for rows of such logits; null: the kernels of the CPU, or torch's operations.
const CudaKernels* row_kernels(const at::Tensor& logits);

// What they leave of rows: states [N, kRowState], a RowState each (logits/rows_cuda.h), and what
// has a gradient, entropies undefined if they are not asked for. All in float32, side by side.
inline constexpr int64_t kRowState = 7;
struct RowsOnDevice {
  at::Tensor states, logps, entropies;

  std::vector<at::Tensor> values() const;
};

// Memory for what backward needs of rows of such logits: RowStatistics, or those states.
at::Tensor empty_statistics(int64_t rows, const at::Tensor& logits);
// And, beside states, for what has a gradient.
RowsOnDevice rows_on_device(const at::Tensor& states, at::IntArrayRef sizes, bool entropies);

// The rows of a tensor [..., V]: leading dimensions that lie end to end are one. A vocabulary of 0
// says that more than two are left, which rows cannot express.
ConstLogits rows_of(const at::Tensor& logits);
// The same rows, to be written to.
MutableLogits writable(const at::Tensor& logits);
// `logits` itself or, for the rare layouts that need it, a contiguous copy.
at::Tensor with_rows(const at::Tensor& logits);

// row_statistics and row_gradients or, with kept ids [N, K] in int64, those over a support. targets
// [N]: int64; both contiguous. The statistics are those of the CPU; gradients are by the kernels
// that have left theirs.
void statistics_of_rows(const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& support, const RowOptions& options,
                        RowStatistics* statistics);
struct RowUpstreams {
  at::Tensor dlogps, dentropies;  // [N], of upstream_row; undefined: 0
};
void gradients_of_rows(const at::Tensor& logits, const at::Tensor& targets,
                       const at::Tensor& support, const RowOptions& options,
                       const at::Tensor& statistics, const RowUpstreams& upstreams,
                       const at::Tensor& dlogits);
// The ids of a support as the kernels take them.
KeptIds kept_ids(const at::Tensor& support);

// Sizes of the positions of logits [..., V].
at::IntArrayRef positions_of(const at::Tensor& logits);

// value(row) for every row, in a tensor of these sizes and type.
template <class Row, class Value>
at::Tensor from_rows(const Row* rows, at::IntArrayRef sizes, at::ScalarType type, Value value) {
  const at::Tensor out = at::empty(sizes, at::dtype(at::kDouble));
  double* values = out.data_ptr<double>();
  for (int64_t row = 0; row < out.numel(); ++row) values[row] = value(rows[row]);
  return out.to(type);
}

// What has a gradient: logps and, if asked for, entropies.
std::vector<at::Tensor> values_of(const at::Tensor& statistics, at::IntArrayRef sizes,
                                  at::ScalarType type, const RowOptions& options, bool entropies);
// These and, with RowSums::all, the constants.
TokenLogps token_logps_of(const std::vector<at::Tensor>& values, const at::Tensor& statistics,
                          const RowOptions& options);

// The gradient of an output, if it was used; the same as a row of such numbers, or undefined.
std::optional<at::Tensor> upstream_of(const std::vector<at::Tensor>& upstreams, size_t output);
at::Tensor upstream_row(const std::optional<at::Tensor>& upstream, at::ScalarType type);

// ids: int64, contiguous. IndexError with the place of the first that is neither in [0, vocabulary)
// nor `ignored`.
void check_ids(std::string_view function, std::string_view name, const at::Tensor& ids,
               int64_t vocabulary, std::optional<int64_t> ignored = {});

}  // namespace tether::detail
