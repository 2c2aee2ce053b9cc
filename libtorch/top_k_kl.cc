#include "libtorch/top_k_kl.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <string>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/tensor_number.h"

namespace tether {
namespace {

using detail::rows_of;
using detail::statistics_of;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "top_k_kl";

// ---- checks -------------------------------------------------------------------------------------

void check_logits(const std::string& name, const char* argument, const at::Tensor& logits) {
  using namespace detail;
  check_value(logits.defined(), name + ": " + argument + " must be a tensor, got none");
  check_floating(name, argument, logits);
  check_value(logits.dim() >= 1 && logits.size(-1) >= 1, name + ": " + argument +
                                                             " must be [..., V] with V at least 1, "
                                                             "got " +
                                                             shape_text(logits.sizes()));
}

void check_head(const std::string& name, const at::Tensor& ids, const char* argument,
                const at::Tensor& logits) {
  using namespace detail;
  check_value(ids.defined(), name + ": head_ids must be a tensor, got none");
  check_type(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
             name + ": head_ids must be int32 or int64, got " + dtype_text(ids.scalar_type()));
  check_device(name, "head_ids", ids, argument, logits);
  const auto leading = static_cast<size_t>(logits.dim() - 1);
  check_value(ids.dim() == logits.dim() &&
                  ids.sizes().slice(0, leading) == logits.sizes().slice(0, leading),
              name + ": head_ids must be [..., k] like " + argument + " " +
                  shape_text(logits.sizes()) + ", got " + shape_text(ids.sizes()));
}

void check_logps(const char* argument, const at::Tensor& logps, const char* like_name,
                 const at::Tensor& like) {
  using namespace detail;
  const std::string name = kName;
  check_value(logps.defined(), name + ": " + argument + " must be a tensor, got none");
  check_floating(name, argument, logps);
  check_constant(name, argument, logps);
  check_device(name, argument, logps, like_name, like);
  check_value(logps.sizes() == like.sizes(), name + ": " + argument + " must be " +
                                                 shape_text(like.sizes()) + " like " + like_name +
                                                 ", got " + shape_text(logps.sizes()));
}

// The inputs beside the logits: contiguous, int64 and float64.
struct Inputs {
  at::Tensor ids, logps, targets, target_logps;

  TopKHeads heads(const at::Tensor& q_rows) const {
    const auto numbers = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.const_data_ptr<double>() : nullptr;
    };
    return {.q = rows_of(q_rows),
            .size = ids.size(-1),
            .ids = ids.const_data_ptr<int64_t>(),
            .p_logps = numbers(logps),
            .targets = targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr,
            .p_target_logps = numbers(target_logps)};
  }
};

Inputs checked(const at::Tensor& q, const TopKReference& p, const TopKKlOptions& options) {
  check_logits(kName, "q_logits", q);
  check_head(kName, p.head_ids, "q_logits", q);
  check_logps("head_logps", p.head_logps, "head_ids", p.head_ids);
  detail::with_public_errors([&] { check_fields(kName, options); });
  Inputs out{.ids = p.head_ids.to(at::kLong).contiguous(),
             .logps = p.head_logps.to(at::kDouble).contiguous(),
             .targets = {},
             .target_logps = {}};
  at::Tensor active_ids = out.ids;
  if (options.tail != TailEstimate::bucket || p.targets.defined()) {
    detail::check_targets(kName, p.targets, "q_logits", q);
    out.targets = p.targets.to(at::kLong).contiguous();
    detail::check_ids(kName, out.targets.cpu(), q.size(-1), options.ignore_index);
    active_ids = out.ids.masked_fill((out.targets == options.ignore_index).unsqueeze(-1), 0);
  }
  if (options.tail != TailEstimate::bucket) {
    check_logps("target_logps", p.target_logps, "targets", p.targets);
    out.target_logps = p.target_logps.to(at::kDouble).contiguous();
  }
  detail::check_head_ids(kName, active_ids.cpu(), q.size(-1));
  return out;
}

// ---- autograd -----------------------------------------------------------------------------------

// The gradient; a Function of its own so that a second backward raises.
class TopKKlGradient : public Function<TopKKlGradient> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& q, const at::Tensor& statistics,
                            const at::Tensor& upstream, const Inputs* inputs,
                            const TopKKlOptions* options) {
    const at::Tensor rows = detail::with_rows(q);
    const at::Tensor factors = upstream.to(at::kDouble).contiguous();
    const at::Tensor dq = at::empty_like(q, at::MemoryFormat::Contiguous);
    top_k_kl_gradients(inputs->heads(rows), *options, statistics_of(statistics),
                       factors.const_data_ptr<double>(), detail::writable(dq), torch_executor());
    return dq;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, kName,
        ": the gradient must not be differentiated again, got a second backward. Detach it, or "
        "use torch.log_softmax for second derivatives");
    return {};
  }
};

class TopKKlFunction : public Function<TopKKlFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const Inputs* inputs,
                            const TopKKlOptions* options) {
    const at::Tensor rows = detail::with_rows(q);
    const int64_t count = q.numel() / q.size(-1);
    const at::Tensor statistics = detail::empty_statistics(count);
    const at::IntArrayRef sizes = q.sizes().slice(0, static_cast<size_t>(q.dim() - 1));
    const at::Tensor kl = at::empty(sizes, at::dtype(at::kDouble));
    detail::with_public_errors([&] {
      top_k_kl(inputs->heads(rows), *options, statistics_of(statistics), kl.data_ptr<double>(),
               torch_executor());
    });
    context->save_for_backward({detail::savable(q), detail::savable(inputs->ids),
                                detail::savable(inputs->logps), detail::savable(inputs->targets),
                                detail::savable(inputs->target_logps)});
    context->saved_data["statistics"] = statistics;
    context->saved_data["temperature"] = options->temperature;
    context->saved_data["tail"] = static_cast<int64_t>(options->tail);
    context->saved_data["ignore_index"] = options->ignore_index;
    context->saved_data["precision"] = options->precision;
    return kl.to(detail::result_type(q));
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto& data = context->saved_data;
    const variable_list saved = context->get_saved_variables();
    const Inputs inputs{saved[1], saved[2], saved[3], saved[4]};
    const TopKKlOptions options{.temperature = data.at("temperature").toDouble(),
                                .tail = static_cast<TailEstimate>(data.at("tail").toInt()),
                                .ignore_index = data.at("ignore_index").toInt(),
                                .precision = data.at("precision").toDouble()};
    return {TopKKlGradient::apply(saved[0], data.at("statistics").toTensor(), upstreams[0], &inputs,
                                  &options),
            at::Tensor(), at::Tensor()};
  }
};

}  // namespace

namespace detail {

at::Tensor top_k_kl_any_device(const at::Tensor& q_logits, const TopKReference& p,
                               const TopKKlOptions& options) {
  const auto type = result_type(q_logits);
  const bool sampled = options.tail != TailEstimate::bucket;
  const at::Tensor ids = p.head_ids.to(at::kLong);
  const at::IntArrayRef sizes = q_logits.sizes().slice(0, static_cast<size_t>(q_logits.dim() - 1));
  const at::Tensor targets =
      p.targets.defined() ? p.targets.to(at::kLong) : at::zeros(sizes, ids.options());
  const at::Tensor ignored =
      p.targets.defined() ? targets == options.ignore_index : targets.to(at::kBool);
  const at::Tensor whole_row = ignored.unsqueeze(-1);
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  at::Tensor x = q_logits.to(type);
  // Filling -inf with -inf, and ignored rows with 0, cuts the gradient there.
  x = x.masked_fill(x == minus_infinity, minus_infinity).masked_fill(whole_row, 0);
  const at::Tensor log_softmax = at::log_softmax(x / options.temperature, -1);
  const auto log_q = [&](const at::Tensor& at) { return log_softmax.gather(-1, at); };
  const at::Tensor active_ids = ids.masked_fill(whole_row, 0);
  const at::Tensor y = targets.masked_fill(ignored, 0);
  const TensorNumber head_q{log_q(active_ids)};
  const TensorNumber head_p{p.head_logps.to(type).masked_fill(whole_row, 0)};
  const TensorNumber mass_q{1 - head_q.value.exp().sum(-1)};
  const TensorNumber mass_p{1 - head_p.value.exp().sum(-1)};
  const TensorNumber y_q{log_q(y.unsqueeze(-1)).squeeze(-1)};
  const TensorNumber y_p{sampled ? p.target_logps.to(type).masked_fill(ignored, 0)
                                 : at::zeros_like(y_q.value)};
  const TensorCondition inside{(active_ids == y.unsqueeze(-1)).any(-1)};
  const at::Tensor tail =
      tail_kl(options.tail, mass_q, mass_p, options.precision,
              type == at::kDouble ? kSaturation<double> : double{kSaturation<float>}, y_q, y_p,
              inside)
          .value;
  const at::Tensor kl = head_kl(head_q, head_p).value.sum(-1) + tail;
  // Never negative, without cutting the gradient.
  const at::Tensor raised = options.tail == TailEstimate::k1 ? kl : kl - kl.detach().clamp_max(0);
  return raised.masked_fill(ignored, 0);
}

}  // namespace detail

at::Tensor top_k_kl(const at::Tensor& q_logits, const TopKReference& p,
                    const TopKKlOptions& options) {
  const Inputs inputs = checked(q_logits, p, options);
  if (!q_logits.is_cpu()) return detail::top_k_kl_any_device(q_logits, p, options);
  return TopKKlFunction::apply(q_logits, &inputs, &options);
}

at::Tensor head_logps(const at::Tensor& logits, const at::Tensor& head_ids, double temperature) {
  const std::string name = "head_logps";
  check_logits(name, "logits", logits);
  check_head(name, head_ids, "logits", logits);
  const RowOptions options{.temperature = temperature, .sums = RowSums::logp};
  detail::with_public_errors([&] { check_fields(name, options); });
  const at::Tensor ids = head_ids.to(at::kLong).contiguous();
  detail::check_head_ids(name, ids.cpu(), logits.size(-1));
  const auto type = detail::result_type(logits);
  if (!logits.is_cpu()) {
    return at::log_softmax(logits.detach().to(type) / temperature, -1).gather(-1, ids);
  }
  const at::Tensor rows = detail::with_rows(logits);
  const at::Tensor statistics = detail::empty_statistics(logits.numel() / logits.size(-1));
  const at::Tensor out = at::empty(ids.sizes(), at::dtype(at::kDouble));
  row_statistics(rows_of(rows), nullptr, options, statistics_of(statistics), torch_executor());
  row_logps(rows_of(rows), statistics_of(statistics), ids.const_data_ptr<int64_t>(), ids.size(-1),
            options, out.data_ptr<double>(), torch_executor());
  return out.to(type);
}

}  // namespace tether
