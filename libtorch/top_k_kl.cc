#include "libtorch/top_k_kl.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <string_view>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/tensor_number.h"
#include "logits/inputs.h"

namespace tether {
namespace {

using detail::rows_of;
using detail::statistics_of;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "top_k_kl";

// The inputs as kernels take them: contiguous, ids in int64, log-probabilities in float64.
using Batch = TopKKlInputs<at::Tensor>;

TopKHeads heads(const Batch& batch, const at::Tensor& q_rows) {
  const auto numbers = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<double>() : nullptr;
  };
  return {.q = rows_of(q_rows),
          .size = batch.head_ids.size(-1),
          .ids = batch.head_ids.const_data_ptr<int64_t>(),
          .p_logps = numbers(batch.head_logps),
          .targets = batch.targets.defined() ? batch.targets.const_data_ptr<int64_t>() : nullptr,
          .p_target_logps = numbers(batch.target_logps)};
}

Batch checked(const at::Tensor& q, const TopKReference& p, const TopKKlOptions& options) {
  const bool sampled = is_sampled(options.tail);
  Batch out{q, p.head_ids, p.head_logps, p.targets, sampled ? p.target_logps : at::Tensor()};
  const auto needed = [&](std::string_view name, const at::Tensor& tensor) {
    require(!sampled || tensor.defined(),
            [&] { return named(kName, name) + " must be given, got none"; });
  };
  needed("targets", p.targets);
  needed("target_logps", p.target_logps);
  face::check_arguments(kName, out);
  check_fields(kName, options);
  const auto in_type = [](at::Tensor& tensor, at::ScalarType type) {
    if (tensor.defined()) tensor = tensor.to(type).contiguous();
  };
  in_type(out.head_ids, at::kLong);
  in_type(out.head_logps, at::kDouble);
  in_type(out.targets, at::kLong);
  in_type(out.target_logps, at::kDouble);
  at::Tensor active_ids = out.head_ids;
  if (out.targets.defined()) {
    detail::check_ids(kName, "targets", out.targets, q.size(-1), options.ignore_index);
    active_ids = active_ids.masked_fill((out.targets == options.ignore_index).unsqueeze(-1), 0);
  }
  detail::check_ids(kName, "head_ids", active_ids, q.size(-1));
  return out;
}

// ---- autograd -----------------------------------------------------------------------------------

// The gradient; a Function of its own so that a second backward raises.
class TopKKlGradient : public Function<TopKKlGradient> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& q, const at::Tensor& statistics,
                            const at::Tensor& upstream, const Batch* batch,
                            const TopKKlOptions* options) {
    const at::Tensor rows = detail::with_rows(q);
    const at::Tensor factors = detail::upstream_row(upstream, at::kDouble);
    const at::Tensor dq = at::empty_like(q, at::MemoryFormat::Contiguous);
    top_k_kl_gradients(heads(*batch, rows), *options, statistics_of(statistics),
                       factors.const_data_ptr<double>(), detail::writable(dq), torch_executor());
    return dq;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward(kName);
  }
};

class TopKKlFunction : public Function<TopKKlFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const Batch* batch,
                            const TopKKlOptions* options) {
    const at::Tensor rows = detail::with_rows(q);
    const at::Tensor statistics = detail::empty_statistics(q.numel() / q.size(-1));
    const at::Tensor kl = at::empty(detail::positions_of(q), at::dtype(at::kDouble));
    top_k_kl(heads(*batch, rows), *options, statistics_of(statistics), kl.data_ptr<double>(),
             torch_executor());
    context->save_for_backward({detail::savable(q), detail::savable(batch->head_ids),
                                detail::savable(batch->head_logps), detail::savable(batch->targets),
                                detail::savable(batch->target_logps), statistics});
    context->saved_data["options"] = detail::packed(*options);
    return kl.to(detail::result_type(q));
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const variable_list saved = context->get_saved_variables();
    const Batch batch{saved[0], saved[1], saved[2], saved[3], saved[4]};
    const auto options = detail::unpacked<TopKKlOptions>(context->saved_data["options"]);
    return {TopKKlGradient::apply(saved[0], saved[5], upstreams[0], &batch, &options), at::Tensor(),
            at::Tensor()};
  }
};

}  // namespace

namespace detail {

at::Tensor top_k_kl_any_device(const at::Tensor& q_logits, const TopKReference& p,
                               const TopKKlOptions& options) {
  const auto type = result_type(q_logits);
  const bool sampled = is_sampled(options.tail);
  const at::Tensor ids = p.head_ids.to(at::kLong);
  const at::Tensor targets = p.targets.defined() ? p.targets.to(at::kLong)
                                                 : at::zeros(positions_of(q_logits), ids.options());
  const at::Tensor ignored =
      p.targets.defined() ? targets == options.ignore_index : targets.to(at::kBool);
  const at::Tensor whole_row = ignored.unsqueeze(-1);
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  at::Tensor x = q_logits.to(at::kDouble);  // what the head leaves of 1 is small
  // Filling -inf with -inf, and ignored rows with 0, cuts the gradient there.
  x = x.masked_fill(x == minus_infinity, minus_infinity).masked_fill(whole_row, 0);
  const at::Tensor log_softmax = at::log_softmax(x / options.temperature, -1);
  const auto log_q = [&](const at::Tensor& at) { return log_softmax.gather(-1, at); };
  const at::Tensor active_ids = ids.masked_fill(whole_row, 0);
  const at::Tensor y = targets.masked_fill(ignored, 0);
  const TensorNumber head_q{log_q(active_ids)};
  const TensorNumber head_p{p.head_logps.to(at::kDouble).masked_fill(whole_row, 0)};
  const TensorNumber mass_q{1 - head_q.value.exp().sum(-1)};
  const TensorNumber mass_p{1 - head_p.value.exp().sum(-1)};
  const at::Tensor drawn = log_q(y.unsqueeze(-1)).squeeze(-1);
  const TensorNumber y_q{drawn.masked_fill(drawn == minus_infinity, NAN)};
  const TensorNumber y_p{sampled ? p.target_logps.to(at::kDouble).masked_fill(ignored, 0)
                                 : at::zeros_like(y_q.value)};
  const TensorCondition inside{(active_ids == y.unsqueeze(-1)).any(-1)};
  const at::Tensor tail =
      tail_kl(options.tail, mass_q, mass_p, options.precision,
              type == at::kDouble ? kSaturation<double> : double{kSaturation<float>}, y_q, y_p,
              inside)
          .value;
  const bool reverse = options.tail == TailEstimate::reverse_bucket;
  const TensorNumber terms = reverse ? head_kl(head_p, head_q) : head_kl(head_q, head_p);
  const at::Tensor kl = terms.value.sum(-1) + tail;
  // Never negative, without cutting the gradient.
  const at::Tensor raised = options.tail == TailEstimate::k1 ? kl : kl - kl.detach().clamp_max(0);
  return raised.masked_fill(ignored, 0).to(type);
}

}  // namespace detail

at::Tensor top_k_kl(const at::Tensor& q_logits, const TopKReference& p,
                    const TopKKlOptions& options) {
  return detail::with_public_errors([&] {
    const Batch batch = checked(q_logits, p, options);
    if (!q_logits.is_cpu()) return detail::top_k_kl_any_device(q_logits, p, options);
    return TopKKlFunction::apply(q_logits, &batch, &options);
  });
}

at::Tensor head_logps(const at::Tensor& logits, const at::Tensor& head_ids, double temperature) {
  const auto function = "head_logps";
  return detail::with_public_errors([&] {
    face::check_arguments(function,
                          HeadLogpsInputs<at::Tensor>{.logits = logits, .head_ids = head_ids});
    const RowOptions options{.temperature = temperature, .sums = RowSums::logp};
    check_fields(function, options);
    const at::Tensor ids = head_ids.to(at::kLong).contiguous();
    detail::check_ids(function, "head_ids", ids, logits.size(-1));
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
  });
}

}  // namespace tether
