#include "libtorch/linear_sweep.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace tether::detail {

LinearSweep::LinearSweep(const LinearInputs& inputs, const at::Tensor& rows,
                         const LinearOptions& options, const at::Tensor& kept)
    : inputs_(inputs),
      count_(rows.numel()),
      padded_(options.rows_per_chunk),
      kept_(kept.defined()) {
  if (count_ < inputs.hidden.size(0)) rows_ = rows;
  if (kept_) {
    chunks_ = 1;
    buffer_ = kept;
    return;
  }
  const int64_t vocabulary = inputs.weight.size(0);
  const int64_t row_bytes = vocabulary * static_cast<int64_t>(inputs.weight.element_size());
  const int64_t fitting =
      padded_ > 0 ? padded_ : std::max<int64_t>(options.chunk_bytes / row_bytes, 1);
  chunks_ = (count_ + fitting - 1) / fitting;
  const int64_t largest = chunks_ > 0 ? (count_ + chunks_ - 1) / chunks_ : 0;
  buffer_ = at::empty({padded_ > 0 ? padded_ : largest, vocabulary}, inputs.weight.options());
}

LinearSweep::Chunk LinearSweep::load(int64_t chunk) {
  const int64_t begin = padded_ > 0 ? chunk * padded_ : count_ * chunk / chunks_;
  const int64_t end =
      padded_ > 0 ? std::min(begin + padded_, count_) : count_ * (chunk + 1) / chunks_;
  Chunk out{.begin = begin, .hidden = {}, .logits = {}, .targets = {}, .rows = {}, .support = {}};
  if (rows_.defined()) {
    out.rows = rows_.slice(0, begin, end);
    out.hidden = at::index_select(inputs_.hidden, 0, out.rows);
    out.targets = at::index_select(inputs_.targets, 0, out.rows);
    if (inputs_.support.defined()) out.support = at::index_select(inputs_.support, 0, out.rows);
  } else {
    out.hidden = inputs_.hidden.slice(0, begin, end);
    out.targets = inputs_.targets.slice(0, begin, end);
    if (inputs_.support.defined()) out.support = inputs_.support.slice(0, begin, end);
  }
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
  const auto wide = at::dtype(halves ? at::kFloat : inputs.weight.scalar_type());
  if (wanted.hidden) sums_.hidden = at::zeros_like(inputs.hidden);
  if (wanted.weight) {
    sums_.weight = chunks > 1 ? at::empty(inputs.weight.sizes(), wide)
                              : at::empty(inputs.weight.sizes(), inputs.weight.options());
    if (halves && chunks > 1) product_ = at::empty_like(inputs.weight);
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
  if (sums_.weight.defined()) {
    if (product_.defined()) {
      at::mm_out(product_, dlogits.t(), chunk.hidden);
      first_ ? sums_.weight.copy_(product_) : sums_.weight.add_(product_);
    } else if (first_) {
      at::mm_out(sums_.weight, dlogits.t(), chunk.hidden);
    } else {
      sums_.weight.addmm_(dlogits.t(), chunk.hidden);
    }
  }
  if (sums_.bias.defined()) sums_.bias.add_(at::sum(dlogits, {0}, false, sums_.bias.scalar_type()));
  first_ = false;
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
