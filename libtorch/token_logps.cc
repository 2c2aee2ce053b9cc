#include "libtorch/token_logps.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <optional>
#include <string>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/flat_batch.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/tensor_number.h"
#include "libtorch/vocabulary_shards.h"
#include "logits/final_logit.h"
#include "logits/inputs.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using detail::rows_of;
using detail::statistics_of;

constexpr const char* kName = "token_logps";

// ---- checks -------------------------------------------------------------------------------------

void check_buffer(const at::Tensor& buffer, const at::Tensor& logits, bool has_kernels) {
  if (!buffer.defined()) return;
  using Rule = Argument<TokenLogpsInputs<at::Tensor>, at::Tensor>;
  face::check_argument(kName,
                       Rule{"gradient_buffer", nullptr, Shape::tokens, Kind::same, Use::optional,
                            Flow::differentiable},
                       buffer, {"logits", logits, Shape::logits, false, 0});
  const auto must = [](bool holds, std::string_view rule) {
    require(holds, [&] { return named(kName, "gradient_buffer must ") + std::string(rule); });
  };
  must(logits.is_cpu() || has_kernels,
       "be absent for logits on " + logits.device().str() + ", got a tensor");
  bool apart = rows_of(buffer).vocabulary != 0 || buffer.numel() == 0;
  for (int64_t d = 0; d < buffer.dim(); ++d) apart &= buffer.size(d) < 2 || buffer.stride(d) != 0;
  must(apart,
       "have memory of its own for every element in at most two steps between rows, got strides " +
           detail::shape_text(buffer.strides()));
  const bool same = buffer.data_ptr() == logits.data_ptr() && buffer.strides() == logits.strides();
  must(same || !buffer.is_alias_of(logits) ||
           at::get_overlap_status(buffer, logits) == at::MemOverlapStatus::No,
       "be logits themselves or share no memory with them, got an overlap");
  must(buffer.is_same(logits) || !buffer.requires_grad(),
       "not require a gradient, got one that does");
}

// ---- autograd -----------------------------------------------------------------------------------

RowOptions row_options(const TokenLogpsOptions& options) {
  RowOptions row = detail::row_options(options);
  row.first_id = options.shard.first_id;
  row.ids = options.shard.ids;
  return row;
}

// The gradient of TokenLogpsFunction; a Function of its own so that a second backward raises
// instead of taking the gradient for a constant.
class TokenLogpsGradient : public Function<TokenLogpsGradient> {
 public:
  using Upstream = std::optional<at::Tensor>;  // none where an output was not used

  static at::Tensor forward(AutogradContext*, const at::Tensor& logits, const at::Tensor& targets,
                            const Upstream& support, const at::Tensor& statistics,
                            const Upstream& dlogps, const Upstream& dentropies,
                            const RowOptions& options, const Upstream& buffer_or_none) {
    const at::Tensor buffer = buffer_or_none.value_or(at::Tensor());
    const bool in_place = buffer.defined() && buffer.data_ptr() == logits.data_ptr();
    const at::Tensor in = in_place ? logits : detail::with_rows(logits);
    const at::Tensor dlogits =
        buffer.defined() ? buffer : at::empty_like(logits, at::MemoryFormat::Contiguous);
    const auto type = statistics.scalar_type();
    detail::gradients_of_rows(
        in, targets, support.value_or(at::Tensor()), options, statistics,
        {detail::upstream_row(dlogps, type), detail::upstream_row(dentropies, type)}, dlogits);
    // Whoever else has saved the tensor learns that it has changed.
    if (buffer.defined()) buffer.unsafeGetTensorImpl()->bump_version();
    return buffer.defined() ? buffer.detach() : dlogits;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward(kName);
  }
};

// What has a gradient; `statistics` is filled.
variable_list values_of(const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& support, const at::Tensor& statistics,
                        const RowOptions& row, const TokenLogpsOptions& options) {
  const at::Tensor rows = detail::with_rows(logits);
  if (const auto* kernels = detail::row_kernels(logits)) {
    const auto found = detail::rows_on_device(statistics, targets.sizes(), options.entropies);
    kernels->row_statistics(rows, targets, support, row, found);
    if (row.ids > 0) {
      detail::gather_on_device(options.shard, logits.size(-1), targets, support, row, found);
    }
    return found.values();
  }
  detail::statistics_of_rows(rows, targets, support, row, statistics_of(statistics));
  if (row.ids > 0) {
    detail::gather_shards(options.shard, logits.size(-1), targets, support, row, statistics);
  }
  return detail::values_of(statistics, targets.sizes(), detail::result_type(logits), row,
                           options.entropies);
}

int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

// targets: int64, contiguous.
class TokenLogpsFunction : public Function<TokenLogpsFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& logits,
                               const at::Tensor& targets, const std::optional<at::Tensor>& kept,
                               const at::Tensor& statistics, const RowOptions& row,
                               const TokenLogpsOptions* options) {
    const variable_list values =
        values_of(logits, targets, kept.value_or(at::Tensor()), statistics, row, *options);
    context->save_for_backward({detail::savable(logits), detail::savable(targets), statistics});
    context->saved_data["support"] = kept ? c10::IValue(*kept) : c10::IValue();
    context->saved_data["row"] = detail::packed(row);
    // Not as a saved variable: it is there to be changed.
    const at::Tensor& buffer = options->gradient_buffer;
    context->saved_data["buffer"] = buffer.defined() ? c10::IValue(buffer.detach()) : c10::IValue();
    context->saved_data["version"] = buffer.defined() ? version_of(buffer) : int64_t{0};
    context->saved_data["view_of_leaf"] = logits.is_view() && logits._base().is_leaf();
    context->set_materialize_grads(false);
    return values;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto dlogps = detail::upstream_of(upstreams, 0);
    const auto dentropies = detail::upstream_of(upstreams, 1);
    variable_list gradients(6);
    if (!dlogps && !dentropies) return gradients;
    const variable_list saved = context->get_saved_variables();
    const auto buffer = context->saved_data["buffer"].toOptional<at::Tensor>();
    detail::check_value(
        !buffer || version_of(*buffer) == context->saved_data["version"].toInt(),
        std::string(kName) +
            ": gradient_buffer must be used for nothing else until backward, got one that has "
            "changed. Give each call a buffer of its own");
    gradients[0] = TokenLogpsGradient::apply(
        saved[0], saved[1], context->saved_data["support"].toOptional<at::Tensor>(), saved[2],
        dlogps, dentropies, detail::unpacked<RowOptions>(context->saved_data["row"]), buffer);
    if (!buffer) return gradients;
    // A leaf keeps a gradient as its .grad if nobody else holds it, and the next call would write
    // there: held here, it is copied. Views hand on tensors of their own.
    context->saved_data["held"] = gradients[0];
    if (context->saved_data["view_of_leaf"].toBool()) gradients[0] = gradients[0].clone();
    return gradients;
  }
};

// ---- any device ---------------------------------------------------------------------------------

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// x / T of logits/rows.h; a finite one that overflows counts as the largest number. Filling -inf
// with -inf cuts the gradient there, as 0 does that of ignored rows.
at::Tensor final_logits(const at::Tensor& logits, const RowOptions& row) {
  const at::Tensor stored = logits.to(detail::result_type(logits));
  at::Tensor x = stored * row.scale;
  const at::Tensor absent = stored == kMinusInfinity, infinite = stored == -kMinusInfinity;
  if (rows::is_capped(row)) {
    const TensorNumber known{stored.masked_fill(absent, 0)};
    const TensorNumber slope{rows::capped_slope(known.value.detach(), row)};
    x = with_gradient_of({rows::capped(known.value, row)}, slope * known).value;
  }
  const TensorNumber quotient{x / row.temperature};
  x = with_gradient_of({detail::narrowed(quotient.value, logits)}, quotient).value;
  return at::where(infinite, stored, x.masked_fill(absent, kMinusInfinity));
}

}  // namespace

namespace detail {

TokenLogps token_logps_any_device(const at::Tensor& logits, const at::Tensor& targets,
                                  const TokenLogpsOptions& options) {
  const RowOptions& row = options.row;
  const at::Tensor ignored = targets == row.ignore_index;
  const at::Tensor x = final_logits(logits.masked_fill(ignored.unsqueeze(-1), 0), row);
  const at::Tensor log_p = at::log_softmax(x, -1);
  const at::Tensor index = targets.masked_fill(ignored, 0).unsqueeze(-1);
  TokenLogps out = {.logps = log_p.gather(-1, index).squeeze(-1).masked_fill(ignored, 0)};
  if (options.entropies) {
    const at::Tensor p = log_p.exp();
    // Of a column with p = 0 there is nothing to add, and a large slope to overflow beside a 0.
    out.entropies = -(p * log_p.masked_fill(p == 0, 0)).sum(-1).masked_fill(ignored, 0);
  }
  if (options.statistics) {
    const at::Tensor constant = x.detach(), absent = constant == kMinusInfinity;
    out.sum_of_squared_p = (2 * log_p.detach()).exp().sum(-1).masked_fill(ignored, 1);
    out.mean_logits = (constant.masked_fill(absent, 0).sum(-1) / absent.logical_not().sum(-1))
                          .masked_fill(ignored, 0);
    const at::Tensor largest = constant.amax(-1);
    const at::Tensor reached = constant.gather(-1, index).squeeze(-1) >= largest;
    const at::Tensor sound = at::isfinite(largest);
    out.target_is_largest = reached.logical_and(sound).logical_or(ignored);
  }
  return out;
}

TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options, const at::Tensor& support) {
  face::check_arguments(kName, TokenLogpsInputs<at::Tensor>{.logits = logits, .targets = targets});
  const RowOptions row = tether::row_options(options);
  const bool has_kernels = row_kernels(logits) != nullptr;
  check_buffer(options.gradient_buffer, logits, has_kernels);
  check_shard(options.shard, logits);
  check_fields(kName, options.row);
  const at::Tensor ids = targets.to(at::kLong).contiguous();
  const int64_t vocabulary = options.shard.ids > 0 ? options.shard.ids : logits.size(-1);
  if (!has_kernels) check_ids(kName, "targets", ids, vocabulary, options.row.ignore_index);
  if (!logits.is_cpu() && !has_kernels) return token_logps_any_device(logits, ids, options);
  const at::Tensor statistics = empty_statistics(ids.numel(), logits);
  return token_logps_of(
      TokenLogpsFunction::apply(logits, ids, input_of_graph(support), statistics, row, &options),
      statistics, row);
}

}  // namespace detail

TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options) {
  return detail::with_public_errors(
      [&] { return detail::token_logps(logits, targets, options, {}); });
}

}  // namespace tether
