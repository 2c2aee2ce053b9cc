#include "libtorch/linear_sweep.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "libtorch/logits_rows.h"

namespace tether::detail {

int64_t bytes_of_chunk(const LinearInputs& inputs, const LinearOptions& options) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  return options.chunk_bytes.value_or(row_kernels(inputs.hidden) ? 1024 * kMiB : 256 * kMiB);
}

VisitedRows VisitedRows::where(const at::Tensor& active, const LinearInputs& inputs) {
  if (row_kernels(inputs.hidden)) return {.places = {}, .others = ~active};
  return {.places = at::nonzero(active).view({-1}), .others = {}};
}

LinearSweep::LinearSweep(const LinearInputs& inputs, const VisitedRows& rows,
                         const LinearOptions& options, const at::Tensor& kept)
    : inputs_(inputs),
      others_(rows.others),
      count_(rows.places.defined() ? rows.places.numel() : inputs.hidden.size(0)),
      padded_(options.rows_per_chunk) {
  if (count_ < inputs.hidden.size(0)) rows_ = rows.places;
  kept_ = kept.defined() && kept.size(0) == count_;
  if (kept_) {
    chunks_ = 1;
    buffer_ = kept;
    return;
  }
  const int64_t vocabulary = inputs.weight.size(0);
  const int64_t row_bytes = vocabulary * static_cast<int64_t>(inputs.weight.element_size());
  const int64_t fitting =
      padded_ > 0 ? padded_ : std::max<int64_t>(bytes_of_chunk(inputs, options) / row_bytes, 1);
  chunks_ = (count_ + fitting - 1) / fitting;
  const int64_t largest = chunks_ > 0 ? (count_ + chunks_ - 1) / chunks_ : 0;
  buffer_ = at::empty({padded_ > 0 ? padded_ : largest, vocabulary}, inputs.weight.options());
}

at::Tensor LinearSweep::Chunk::of(const at::Tensor& all) const {
  if (!all.defined()) return all;
  return rows.defined() ? at::index_select(all, 0, rows) : all.narrow(0, begin, count);
}

LinearSweep::Chunk LinearSweep::load(int64_t chunk) {
  const int64_t begin = padded_ > 0 ? chunk * padded_ : count_ * chunk / chunks_;
  const int64_t end =
      padded_ > 0 ? std::min(begin + padded_, count_) : count_ * (chunk + 1) / chunks_;
  Chunk out{.begin = begin,
            .count = end - begin,
            .hidden = {},
            .logits = {},
            .targets = {},
            .rows = rows_.defined() ? rows_.slice(0, begin, end) : rows_,
            .support = {}};
  out.hidden = out.of(inputs_.hidden);
  out.targets = out.of(inputs_.targets);
  out.support = out.of(inputs_.support);
  // 0 times NaN would reach the gradient of the weight.
  if (others_.defined()) out.hidden = out.hidden.masked_fill(out.of(others_).unsqueeze(-1), 0);
  out.logits = buffer_.slice(0, 0, end - begin);
  if (kept_) return out;
  at::Tensor product = padded_ > 0 ? buffer_ : out.logits;
  const int64_t missing = product.size(0) - out.hidden.size(0);
  at::Tensor rows = out.hidden;
  if (missing > 0) rows = at::constant_pad_nd(rows, {0, 0, 0, missing});
  if (padded_ > 0) rows = rows.contiguous();  // bits depend on strides too
  const at::Tensor columns = inputs_.weight.t();
  if (inputs_.bias.defined()) {
    at::addmm_out(product, inputs_.bias, rows, columns);
  } else {
    at::mm_out(product, rows, columns);
  }
  return out;
}

LinearGradientSum::LinearGradientSum(const LinearInputs& inputs, WantedLinear wanted,
                                     int64_t chunks)
    : inputs_(inputs) {
  const bool halves = inputs.weight.element_size() == 2;
  const auto wide =
      inputs.weight.options().dtype(halves ? at::kFloat : inputs.weight.scalar_type());
  widens_ = halves && chunks > 1 && row_kernels(inputs.weight) != nullptr;
  if (wanted.hidden) sums_.hidden = at::zeros_like(inputs.hidden);
  if (wanted.weight) {
    sums_.weight = chunks > 1 ? at::empty(inputs.weight.sizes(), wide)
                              : at::empty(inputs.weight.sizes(), inputs.weight.options());
    if (halves && chunks > 1 && !widens_) product_ = at::empty_like(inputs.weight);
    if (chunks == 0) sums_.weight.zero_();
  }
  if (wanted.bias) sums_.bias = at::zeros(inputs.bias.sizes(), wide);
}

void LinearGradientSum::add(const LinearSweep::Chunk& chunk) {
  const at::Tensor& dlogits = chunk.logits;
  if (sums_.hidden.defined() && chunk.rows.defined()) {
    sums_.hidden.index_copy_(0, chunk.rows, at::mm(dlogits, inputs_.weight));
  } else if (sums_.hidden.defined()) {
    at::Tensor out = sums_.hidden.narrow(0, chunk.begin, dlogits.size(0));
    at::mm_out(out, dlogits, inputs_.weight);
  }
  if (sums_.weight.defined()) add_to_weight(dlogits.t(), chunk.hidden);
  if (sums_.bias.defined()) sums_.bias.add_(at::sum(dlogits, {0}, false, sums_.bias.scalar_type()));
  first_ = false;
}

void LinearGradientSum::add_to_weight(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor& sum = sums_.weight;
  if (widens_ && first_) {
    at::mm_out(sum, a, b, sum.scalar_type());
  } else if (widens_) {
    at::addmm_out(sum, sum, a, b, sum.scalar_type());
  } else if (product_.defined()) {
    at::mm_out(product_, a, b);
    first_ ? sum.copy_(product_) : sum.add_(product_);
  } else if (first_) {
    at::mm_out(sum, a, b);
  } else {
    sum.addmm_(a, b);
  }
}

LinearGradient LinearGradientSum::take() {
  const auto narrowed = [](const at::Tensor& sum, const at::Tensor& like) {
    return sum.defined() ? sum.to(like.scalar_type()) : sum;
  };
  product_ = at::Tensor();
  return {sums_.hidden, narrowed(sums_.weight, inputs_.weight),
          narrowed(sums_.bias, inputs_.bias.defined() ? inputs_.bias : inputs_.weight)};
}

}  // namespace tether::detail
