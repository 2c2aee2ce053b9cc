#include "libtorch/logits_rows.h"

#include <c10/util/Exception.h>

#include <vector>

#include "libtorch/arrays.h"

namespace tether::detail {
namespace {

// The index of element `i` of a contiguous tensor of this shape.
std::vector<int64_t> unravelled(int64_t i, at::IntArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; i /= sizes[d]) index[d] = i % sizes[d];
  return index;
}

}  // namespace

at::Tensor empty_statistics(int64_t rows) {
  return at::empty({rows, kStatistics}, at::dtype(at::kDouble));
}

RowStatistics* statistics_of(const at::Tensor& tensor) {
  return reinterpret_cast<RowStatistics*>(tensor.data_ptr<double>());
}

at::ScalarType result_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ConstLogits rows_of(const at::Tensor& logits) {
  ConstLogits rows = strided_rows(logits.sizes().data(), logits.strides().data(), logits.dim());
  rows.dtype = face::Access<at::Tensor>::element(logits).dtype;
  rows.data = logits.const_data_ptr();
  return rows;
}

MutableLogits writable(const at::Tensor& logits) {
  const ConstLogits rows = rows_of(logits);
  return {logits.mutable_data_ptr(), rows.dtype,  rows.rows,    rows.vocabulary,
          rows.row_stride,           rows.stride, rows.columns, rows.batch_stride};
}

at::Tensor with_rows(const at::Tensor& logits) {
  return rows_of(logits).vocabulary == 0 ? logits.contiguous() : logits;
}

void check_targets(const std::string& function, const at::Tensor& targets, const std::string& name,
                   const at::Tensor& like) {
  check_value(targets.defined(), function + ": targets must be a tensor, got none");
  check_type(
      targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
      function + ": targets must be int32 or int64, got " + dtype_text(targets.scalar_type()));
  check_device(function, "targets", targets, name, like);
  const at::IntArrayRef expected = like.sizes().slice(0, static_cast<size_t>(like.dim() - 1));
  check_value(targets.sizes() == expected, function + ": targets must be " + shape_text(expected) +
                                               " like " + name + " " + shape_text(like.sizes()) +
                                               ", got " + shape_text(targets.sizes()));
}

void check_ids(const std::string& function, const at::Tensor& targets, int64_t vocabulary,
               int64_t ignore_index) {
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const int64_t bad = first_bad_target(ids, targets.numel(), vocabulary, ignore_index);
  if (bad == targets.numel()) return;
  TORCH_CHECK_INDEX(false, function, ": targets must be in [0, ", vocabulary, ") or ignore_index ",
                    ignore_index, ", got ", ids[bad], " at ",
                    shape_text(unravelled(bad, targets.sizes())));
}

void check_head_ids(const std::string& function, const at::Tensor& head_ids, int64_t vocabulary) {
  const int64_t* ids = head_ids.const_data_ptr<int64_t>();
  const int64_t bad = first_bad_target(ids, head_ids.numel(), vocabulary, /*ignore_index=*/0);
  if (bad == head_ids.numel()) return;
  TORCH_CHECK_INDEX(false, function, ": head_ids must be in [0, ", vocabulary, "), got ", ids[bad],
                    " at ", shape_text(unravelled(bad, head_ids.sizes())));
}

}  // namespace tether::detail
