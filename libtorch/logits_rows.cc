#include "libtorch/logits_rows.h"

#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "logits/final_logit.h"

namespace tether::detail {
namespace {

// The index of element `i` of a contiguous tensor of this shape.
std::vector<int64_t> unravelled(int64_t i, at::IntArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; i /= sizes[d]) index[d] = i % sizes[d];
  return index;
}

// Of states that kernels for CUDA have left.
void add_further_on_device(const at::Tensor& states, const RowOptions& options, TokenLogps& out) {
  const auto number = [&](int64_t i) { return states.select(1, i).view(out.logps.sizes()); };
  const at::Tensor reference = number(0), sum = number(1), target = number(3);
  const at::Tensor squares = number(4), logits = number(5), columns = number(6);
  out.sum_of_squared_p = squares / (sum * sum);
  out.mean_logits = logits / columns * rows::multiplier(options);
  out.target_is_largest = (target >= reference).bitwise_and(sum > 0);
}

const double* data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<double>() : nullptr;
}

}  // namespace

at::Tensor empty_statistics(int64_t rows) {
  return at::empty({rows, kStatistics}, at::dtype(at::kDouble));
}

const CudaKernels* row_kernels(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? nullptr : cuda_kernels(logits);
}

std::vector<at::Tensor> RowsOnDevice::values() const {
  if (!entropies.defined()) return {logps};
  return {logps, entropies};
}

at::Tensor empty_statistics(int64_t rows, const at::Tensor& logits) {
  if (row_kernels(logits) == nullptr) return empty_statistics(rows);
  return at::empty({rows, kRowState}, logits.options().dtype(at::kFloat));
}

RowsOnDevice rows_on_device(const at::Tensor& states, at::IntArrayRef sizes, bool entropies) {
  const auto numbers = [&] { return at::empty(sizes, states.options()); };
  return {states, numbers(), entropies ? numbers() : at::Tensor()};
}

RowStatistics* statistics_of(const at::Tensor& tensor) {
  return reinterpret_cast<RowStatistics*>(tensor.data_ptr<double>());
}

at::IntArrayRef positions_of(const at::Tensor& logits) {
  return logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
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

KeptIds kept_ids(const at::Tensor& support) {
  const int64_t size = support.size(-1), rows = support.numel() / std::max<int64_t>(size, 1);
  return {{.rows = rows, .columns = size},
          {support.const_data_ptr<int64_t>(), DType::int64, size, 1}};
}

void statistics_of_rows(const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& support, const RowOptions& options,
                        RowStatistics* statistics) {
  const ConstLogits in = rows_of(logits);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  if (support.defined()) {
    support_statistics(in, ids, kept_ids(support), options, statistics, nullptr, torch_executor());
  } else {
    row_statistics(in, ids, options, statistics, torch_executor());
  }
}

void gradients_of_rows(const at::Tensor& logits, const at::Tensor& targets,
                       const at::Tensor& support, const RowOptions& options,
                       const at::Tensor& statistics, const RowUpstreams& upstreams,
                       const at::Tensor& dlogits) {
  if (const CudaKernels* kernels = row_kernels(logits)) {
    return kernels->row_gradients(logits, targets, support, options, statistics, upstreams,
                                  dlogits);
  }
  const RowStatistics* of_rows = statistics_of(statistics);
  const double *dlogps = data(upstreams.dlogps), *dentropies = data(upstreams.dentropies);
  const ConstLogits in = rows_of(logits);
  const MutableLogits out = writable(dlogits);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  if (support.defined()) {
    support_gradients(in, ids, kept_ids(support), options, of_rows, dlogps, dentropies, out,
                      torch_executor());
  } else {
    row_gradients(in, ids, options, of_rows, dlogps, dentropies, out, torch_executor());
  }
}

std::vector<at::Tensor> values_of(const at::Tensor& statistics, at::IntArrayRef sizes,
                                  at::ScalarType type, const RowOptions& options, bool entropies) {
  const RowStatistics* rows = statistics_of(statistics);
  const auto logp_of = [&](const RowStatistics& row) { return logp(row, options); };
  std::vector<at::Tensor> out = {from_rows(rows, sizes, type, logp_of)};
  if (entropies) out.push_back(from_rows(rows, sizes, type, entropy));
  return out;
}

TokenLogps token_logps_of(const std::vector<at::Tensor>& values, const at::Tensor& statistics,
                          const RowOptions& options) {
  TokenLogps out = {.logps = values[0]};
  if (values.size() > 1) out.entropies = values[1];
  if (options.sums != RowSums::all) return out;
  if (statistics.scalar_type() == at::kFloat) {
    add_further_on_device(statistics, options, out);
    return out;
  }
  const RowStatistics* rows = statistics_of(statistics);
  const at::IntArrayRef sizes = values[0].sizes();
  const at::ScalarType type = values[0].scalar_type();
  const auto mean = [&](const RowStatistics& row) { return mean_logit(row, options); };
  out.sum_of_squared_p = from_rows(rows, sizes, type, sum_of_squared_p);
  out.mean_logits = from_rows(rows, sizes, type, mean);
  out.target_is_largest = from_rows(rows, sizes, at::kBool, target_is_largest);
  return out;
}

std::optional<at::Tensor> upstream_of(const std::vector<at::Tensor>& upstreams, size_t output) {
  const bool used = output < upstreams.size() && upstreams[output].defined();
  return used ? std::optional(upstreams[output]) : std::nullopt;
}

at::Tensor upstream_row(const std::optional<at::Tensor>& upstream, at::ScalarType type) {
  return upstream ? upstream->reshape({-1}).to(type).contiguous() : at::Tensor();
}

void check_ids(std::string_view function, std::string_view name, const at::Tensor& ids,
               int64_t vocabulary, std::optional<int64_t> ignored) {
  const at::Tensor on_host = ids.cpu();
  const int64_t* data = on_host.const_data_ptr<int64_t>();
  const int64_t bad = first_bad_target(data, ids.numel(), vocabulary, ignored.value_or(0));
  if (bad == ids.numel()) return;
  TORCH_CHECK_INDEX(false, function, ": ", name, " must be in [0, ", vocabulary, ")",
                    ignored ? " or ignore_index " + text(*ignored) : "", ", got ", data[bad],
                    " at ", shape_text(unravelled(bad, ids.sizes())));
}

}  // namespace tether::detail
