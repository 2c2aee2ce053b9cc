#include "libtorch/token_logps.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tanh.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <bit>
#include <limits>
#include <optional>
#include <string>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/tensor_number.h"
#include "logits/rows.h"
#include "logits/vocabulary_shards.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using detail::rows_of;
using detail::statistics_of;

constexpr const char* kName = "token_logps";

// ---- checks -------------------------------------------------------------------------------------

void check_tensors(const at::Tensor& logits, const at::Tensor& targets) {
  using namespace detail;
  const std::string name = kName;
  check_value(logits.defined(), name + ": logits must be a tensor, got none");
  check_value(targets.defined(), name + ": targets must be a tensor, got none");
  check_floating(name, "logits", logits);
  check_value(
      logits.dim() >= 1 && logits.size(-1) >= 1,
      name + ": logits must be [..., V] with V at least 1, got " + shape_text(logits.sizes()));
  check_targets(name, targets, "logits", logits);
}

void check_buffer(const at::Tensor& buffer, const at::Tensor& logits) {
  using namespace detail;
  if (!buffer.defined()) return;
  const std::string name = std::string(kName) + ": gradient_buffer";
  check_value(buffer.sizes() == logits.sizes(), name + " must be " + shape_text(logits.sizes()) +
                                                    " like logits, got " +
                                                    shape_text(buffer.sizes()));
  check_type(buffer.scalar_type() == logits.scalar_type(),
             name + " must be " + dtype_text(logits.scalar_type()) + " like logits, got " +
                 dtype_text(buffer.scalar_type()));
  check_device(kName, "gradient_buffer", buffer, "logits", logits);
  check_value(logits.is_cpu(),
              name + " must be absent for logits on " + logits.device().str() + ", got a tensor");
  bool apart = rows_of(buffer).vocabulary != 0 || buffer.numel() == 0;
  for (int64_t d = 0; d < buffer.dim(); ++d) apart &= buffer.size(d) < 2 || buffer.stride(d) != 0;
  check_value(apart, name +
                         " must have memory of its own for every element in at most two steps "
                         "between rows, got strides " +
                         shape_text(buffer.strides()));
  const bool same = buffer.data_ptr() == logits.data_ptr() && buffer.strides() == logits.strides();
  check_value(same || !buffer.is_alias_of(logits) ||
                  at::get_overlap_status(buffer, logits) == at::MemOverlapStatus::No,
              name + " must be logits themselves or share no memory with them, got an overlap");
  check_value(buffer.is_same(logits) || !buffer.requires_grad(),
              name + " must not require a gradient, got one that does");
}

void check_shard(const VocabularyShard& shard, const at::Tensor& logits) {
  using namespace detail;
  const std::string name = std::string(kName) + ": shard";
  check_value(shard.ids != 0 || (shard.first_id == 0 && !shard.gather),
              name + ".ids must be given with first_id or gather, got 0");
  if (shard.ids == 0) return;
  check_value(logits.is_cpu(),
              name + " must be absent for logits on " + logits.device().str() + ", got one");
  check_value(shard.ids >= logits.size(-1),
              name + ".ids must be at least " + text(logits.size(-1)) + " like logits " +
                  shape_text(logits.sizes()) + ", got " + text(shard.ids));
  const int64_t last = shard.ids - logits.size(-1);
  check_value(0 <= shard.first_id && shard.first_id <= last,
              name + ".first_id must be in [0, " + text(last) + "], got " + text(shard.first_id));
  check_value(bool(shard.gather), name + ".gather must be given, got none");
}

// `statistics` of this rank, whose logits have so many columns, become those of all.
void gather_shards(const VocabularyShard& shard, int64_t columns, const at::Tensor& targets,
                   const RowOptions& options, const at::Tensor& statistics) {
  using namespace detail;
  if (shard.ids == 0) return;
  const at::Tensor block = empty_statistics(1 + statistics.size(0));
  const int64_t rows = statistics.size(0);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  *statistics_of(block) = std::bit_cast<RowStatistics>(shard_header(options, columns, ids, rows));
  block.slice(0, 1).copy_(statistics);
  const at::Tensor all = shard.gather(block);
  const std::string shape = text(1 + rows) + ", " + text(kStatistics) + "]";
  check_value(all.defined(), std::string(kName) + ": shard.gather must return a tensor, got none");
  check_value(all.scalar_type() == at::kDouble && all.is_cpu() && all.dim() == 3 &&
                  all.size(0) >= 1 && all.sizes().slice(1) == block.sizes(),
              std::string(kName) + ": shard.gather must return float64 [shards, " + shape +
                  " on cpu, got " + dtype_text(all.scalar_type()) + " " + shape_text(all.sizes()) +
                  " on " + all.device().str());
  const at::Tensor in = all.contiguous();
  with_public_errors([&] {
    merge_shards(kName, statistics_of(in), in.size(0), rows, ids, options,
                 statistics_of(statistics));
  });
}

// ---- autograd -----------------------------------------------------------------------------------

RowOptions row_options(const TokenLogpsOptions& options) {
  return {.temperature = options.temperature,
          .scale = options.scale,
          .softcap = options.softcap,
          .ignore_index = options.ignore_index,
          .sums = options.statistics  ? RowSums::all
                  : options.entropies ? RowSums::entropy
                                      : RowSums::logp,
          .first_id = options.shard.first_id,
          .ids = options.shard.ids};
}

// What backward needs of the options.
void save(AutogradContext* context, const TokenLogpsOptions& options) {
  context->saved_data["temperature"] = options.temperature;
  context->saved_data["scale"] = options.scale;
  context->saved_data["softcap"] = options.softcap;
  context->saved_data["ignore_index"] = options.ignore_index;
  context->saved_data["first_id"] = options.shard.first_id;
  context->saved_data["ids"] = options.shard.ids;
}

RowOptions saved_options(AutogradContext* context) {
  return {.temperature = context->saved_data["temperature"].toDouble(),
          .scale = context->saved_data["scale"].toDouble(),
          .softcap = context->saved_data["softcap"].toDouble(),
          .ignore_index = context->saved_data["ignore_index"].toInt(),
          .first_id = context->saved_data["first_id"].toInt(),
          .ids = context->saved_data["ids"].toInt()};
}

// The gradient of TokenLogpsFunction; a Function of its own so that a second backward raises
// instead of taking the gradient for a constant.
class TokenLogpsGradient : public Function<TokenLogpsGradient> {
 public:
  using Upstream = std::optional<at::Tensor>;  // none where an output was not used

  static at::Tensor forward(AutogradContext*, const at::Tensor& logits, const at::Tensor& targets,
                            const at::Tensor& statistics, const Upstream& dlogps,
                            const Upstream& dentropies, const RowOptions& options,
                            const Upstream& buffer_or_none) {
    const at::Tensor buffer = buffer_or_none.value_or(at::Tensor());
    const bool in_place = buffer.defined() && buffer.data_ptr() == logits.data_ptr();
    const at::Tensor in = in_place ? logits : detail::with_rows(logits);
    const at::Tensor dlogits =
        buffer.defined() ? buffer : at::empty_like(logits, at::MemoryFormat::Contiguous);
    const at::Tensor upstreams[] = {doubles(dlogps), doubles(dentropies)};
    row_gradients(rows_of(in), targets.const_data_ptr<int64_t>(), options,
                  statistics_of(statistics), data(upstreams[0]), data(upstreams[1]),
                  detail::writable(dlogits), torch_executor());
    // Whoever else has saved the tensor learns that it has changed.
    if (buffer.defined()) buffer.unsafeGetTensorImpl()->bump_version();
    return buffer.defined() ? buffer.detach() : dlogits;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, kName,
        ": the gradient must not be differentiated again, got a second backward. Detach it, or "
        "use torch.log_softmax for second derivatives");
    return {};
  }

 private:
  static at::Tensor doubles(const Upstream& upstream) {
    return upstream ? upstream->to(at::kDouble).contiguous() : at::Tensor();
  }
  static const double* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<double>() : nullptr;
  }
};

int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

// targets: int64, contiguous.
class TokenLogpsFunction : public Function<TokenLogpsFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& logits,
                               const at::Tensor& targets, const at::Tensor& statistics,
                               const TokenLogpsOptions* options) {
    const at::Tensor in = detail::with_rows(logits);
    const RowOptions row = row_options(*options);
    row_statistics(rows_of(in), targets.const_data_ptr<int64_t>(), row, statistics_of(statistics),
                   torch_executor());
    gather_shards(options->shard, logits.size(-1), targets, row, statistics);
    context->save_for_backward({detail::savable(logits), detail::savable(targets), statistics});
    save(context, *options);
    // Not as a saved variable: it is there to be changed.
    const at::Tensor& buffer = options->gradient_buffer;
    context->saved_data["buffer"] = buffer.defined() ? c10::IValue(buffer.detach()) : c10::IValue();
    context->saved_data["version"] = buffer.defined() ? version_of(buffer) : int64_t{0};
    context->saved_data["view_of_leaf"] = logits.is_view() && logits._base().is_leaf();
    context->set_materialize_grads(false);
    const auto type = detail::result_type(logits);
    const auto logp_of = [&](const RowStatistics& of) { return logp(of, row); };
    variable_list results = {detail::from_rows(statistics, targets.sizes(), type, logp_of)};
    if (options->entropies) {
      results.push_back(detail::from_rows(statistics, targets.sizes(), type, entropy));
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto upstream = [&](size_t i) {
      const bool used = i < upstreams.size() && upstreams[i].defined();
      return used ? TokenLogpsGradient::Upstream(upstreams[i]) : std::nullopt;
    };
    variable_list gradients(4);
    if (!upstream(0) && !upstream(1)) return gradients;
    const variable_list saved = context->get_saved_variables();
    const auto buffer = context->saved_data["buffer"].toOptional<at::Tensor>();
    detail::check_value(
        !buffer || version_of(*buffer) == context->saved_data["version"].toInt(),
        std::string(kName) +
            ": gradient_buffer must be used for nothing else until backward, got one that has "
            "changed. Give each call a buffer of its own");
    gradients[0] = TokenLogpsGradient::apply(saved[0], saved[1], saved[2], upstream(0), upstream(1),
                                             saved_options(context), buffer);
    if (!buffer) return gradients;
    // A leaf keeps a gradient as its .grad if nobody else holds it, and the next call would write
    // there: held here, it is copied. Views hand on tensors of their own.
    context->saved_data["held"] = gradients[0];
    if (context->saved_data["view_of_leaf"].toBool()) gradients[0] = gradients[0].clone();
    return gradients;
  }
};

}  // namespace

namespace detail {

void add_statistics(const at::Tensor& statistics, at::IntArrayRef sizes, const RowOptions& options,
                    const at::Tensor& input, TokenLogps& out) {
  const auto type = result_type(input);
  const auto mean = [&](const RowStatistics& of) { return mean_logit(of, options); };
  out.sum_of_squared_p = from_rows(statistics, sizes, type, sum_of_squared_p);
  out.mean_logits = from_rows(statistics, sizes, type, mean);
  out.target_is_largest = from_rows(statistics, sizes, at::kBool, target_is_largest);
}

TokenLogps token_logps_any_device(const at::Tensor& logits, const at::Tensor& targets,
                                  const TokenLogpsOptions& options) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  const at::Tensor ignored = targets == options.ignore_index;
  // Filling ignored rows with 0 and -inf with -inf cuts the gradient there.
  at::Tensor x =
      logits.masked_fill(ignored.unsqueeze(-1), 0).to(result_type(logits)) * options.scale;
  const at::Tensor absent = x == minus_infinity;
  if (options.softcap > 0) {
    const at::Tensor z = x.masked_fill(absent, 0) / options.softcap;
    const at::Tensor q = at::exp(-2 * z.detach().abs());  // 1 - tanh^2 = 4 q / (1 + q)^2
    const TensorNumber slope{4 * q / (1 + q).square()};
    x = (with_gradient_of({at::tanh(z)}, slope * TensorNumber{z}) * options.softcap).value;
  }
  x = x.masked_fill(absent, minus_infinity) / options.temperature;
  const at::Tensor log_p = at::log_softmax(x, -1);
  const at::Tensor index = targets.masked_fill(ignored, 0).unsqueeze(-1);
  TokenLogps out = {.logps = log_p.gather(-1, index).squeeze(-1).masked_fill(ignored, 0)};
  if (options.entropies) {
    const at::Tensor finite = log_p.masked_fill(log_p == minus_infinity, 0);
    out.entropies = -(log_p.exp() * finite).sum(-1).masked_fill(ignored, 0);
  }
  if (options.statistics) {
    const at::Tensor constant = x.detach();
    out.sum_of_squared_p = (2 * log_p.detach()).exp().sum(-1).masked_fill(ignored, 1);
    out.mean_logits = (constant.masked_fill(absent, 0).sum(-1) / absent.logical_not().sum(-1))
                          .masked_fill(ignored, 0);
    const at::Tensor largest = constant.amax(-1);
    const at::Tensor reached = constant.gather(-1, index).squeeze(-1) >= largest;
    out.target_is_largest = reached.logical_or(ignored);
  }
  return out;
}

}  // namespace detail

TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options) {
  check_tensors(logits, targets);
  check_buffer(options.gradient_buffer, logits);
  check_shard(options.shard, logits);
  const RowOptions row = row_options(options);
  detail::with_public_errors([&] { check_fields(kName, row); });
  const at::Tensor ids = targets.to(at::kLong).contiguous();
  const int64_t vocabulary = options.shard.ids > 0 ? options.shard.ids : logits.size(-1);
  detail::check_ids(kName, ids.cpu(), vocabulary, options.ignore_index);
  if (!logits.is_cpu()) return detail::token_logps_any_device(logits, ids, options);
  const at::Tensor statistics = detail::empty_statistics(ids.numel());
  const variable_list results = TokenLogpsFunction::apply(logits, ids, statistics, &options);
  TokenLogps out = {.logps = results[0]};
  if (options.entropies) out.entropies = results[1];
  if (options.statistics) detail::add_statistics(statistics, ids.sizes(), row, logits, out);
  return out;
}

}  // namespace tether
