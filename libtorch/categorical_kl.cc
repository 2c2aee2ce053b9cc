#include "libtorch/categorical_kl.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "logits/inputs.h"
#include "logits/pair_kl.h"
#include "logits/support.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "categorical_kl";
constexpr int64_t kSums = sizeof(KlStatistics) / sizeof(double);
static_assert(sizeof(KlStatistics) == kSums * sizeof(double));

KlStatistics* rows_in(const at::Tensor& statistics) {
  return reinterpret_cast<KlStatistics*>(statistics.data_ptr<double>());
}

// ---- on the CPU ---------------------------------------------------------------------------------

using Upstream = std::optional<at::Tensor>;  // none where a result was not used

// kl, reverse_kl and entropies; `statistics` is filled.
variable_list values_on_cpu(const at::Tensor& q, const at::Tensor& p, const Upstream& support,
                            double temperature, const at::Tensor& mask,
                            const at::Tensor& statistics) {
  const auto* active =
      mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
  const ConstLogits x = detail::rows_of(q), y = detail::rows_of(p);
  if (support) {
    support_kl_statistics(x, y, nullptr, detail::kept_ids(*support),
                          {.temperature = temperature, .active = active}, rows_in(statistics),
                          torch_executor());
  } else {
    logits_kl_statistics(x, y, temperature, active, rows_in(statistics), torch_executor());
  }
  const auto values = [&](double LogitsKl::* member) {
    return detail::from_rows(rows_in(statistics), detail::positions_of(q), detail::result_type(q),
                             [&](const KlStatistics& row) { return logits_kl(row).*member; });
  };
  return {values(&LogitsKl::kl), values(&LogitsKl::reverse_kl), values(&LogitsKl::entropy)};
}

void fill(const Upstream& upstream, double LogitsKl::* member, std::vector<LogitsKl>& out) {
  if (!upstream) return;
  const at::Tensor values = detail::upstream_row(upstream, at::kDouble);
  const double* data = values.const_data_ptr<double>();
  for (size_t i = 0; i < out.size(); ++i) out[i].*member = data[i];
}

// To dq and dp, undefined where they are not wanted.
void gradients_on_cpu(const at::Tensor& q, const at::Tensor& p, const Upstream& support,
                      double temperature, const at::Tensor& statistics,
                      const std::vector<Upstream>& upstreams, const at::Tensor& dq,
                      const at::Tensor& dp) {
  std::vector<LogitsKl> upstream(static_cast<size_t>(statistics.size(0)));
  fill(upstreams[0], &LogitsKl::kl, upstream);
  fill(upstreams[1], &LogitsKl::reverse_kl, upstream);
  fill(upstreams[2], &LogitsKl::entropy, upstream);
  const ConstLogits x = detail::rows_of(q), y = detail::rows_of(p);
  const MutableLogits dx = dq.defined() ? detail::writable(dq) : MutableLogits{},
                      dy = dp.defined() ? detail::writable(dp) : MutableLogits{};
  if (support) {
    support_kl_gradients(x, y, nullptr, detail::kept_ids(*support), {.temperature = temperature},
                         rows_in(statistics), upstream.data(), dx, dy, torch_executor());
  } else {
    logits_kl_gradients(x, y, temperature, rows_in(statistics), upstream.data(), dx, dy,
                        torch_executor());
  }
}

// ---- autograd -----------------------------------------------------------------------------------

// The gradients; a Function of its own so that a second backward raises.
class CategoricalKlGradient : public Function<CategoricalKlGradient> {
 public:
  static variable_list forward(AutogradContext*, const at::Tensor& q, const at::Tensor& p,
                               const Upstream& support, const at::Tensor& statistics,
                               const Upstream& kl, const Upstream& reverse_kl,
                               const Upstream& entropy, double temperature, bool with_q,
                               bool with_p) {
    const auto memory = [](bool wanted, const at::Tensor& like) {
      return wanted ? at::empty_like(like, at::MemoryFormat::Contiguous) : at::Tensor();
    };
    const at::Tensor dq = memory(with_q, q), dp = memory(with_p, p);
    const at::Tensor q_rows = detail::with_rows(q), p_rows = detail::with_rows(p);
    const std::vector<Upstream> upstreams{kl, reverse_kl, entropy};
    if (const auto* kernels = detail::row_kernels(q)) {
      kernels->categorical_kl_gradients(q_rows, p_rows, support.value_or(at::Tensor()), temperature,
                                        upstreams, dq, dp);
    } else {
      gradients_on_cpu(q_rows, p_rows, support, temperature, statistics, upstreams, dq, dp);
    }
    const at::Tensor none = at::empty({0}, q.options());
    return {with_q ? dq : none, with_p ? dp : none};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward(kName);
  }
};

class CategoricalKlFunction : public Function<CategoricalKlFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& p,
                               const std::optional<at::Tensor>& support,
                               const CategoricalKlOptions* options) {
    const auto* kernels = detail::row_kernels(q);
    // The kernels read the rows again instead.
    const int64_t rows = kernels ? 0 : q.numel() / q.size(-1);
    const at::Tensor statistics = at::empty({rows, kSums}, at::dtype(at::kDouble));
    const at::Tensor mask = options->mask.defined() ? options->mask.contiguous() : options->mask;
    context->save_for_backward(
        {detail::savable(q), detail::savable(p), statistics, detail::savable(mask)});
    context->saved_data["support"] = support ? c10::IValue(*support) : c10::IValue();
    context->saved_data["temperature"] = options->temperature;
    context->set_materialize_grads(false);
    const at::Tensor q_rows = detail::with_rows(q), p_rows = detail::with_rows(p);
    if (kernels) {
      return kernels->categorical_kl(q_rows, p_rows, support.value_or(at::Tensor()),
                                     options->temperature, mask);
    }
    return values_on_cpu(q_rows, p_rows, support, options->temperature, mask, statistics);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const variable_list saved = context->get_saved_variables();
    bool any = false;
    const auto upstream = [&](size_t i) -> Upstream {
      if (!upstreams[i].defined()) return std::nullopt;
      any = true;
      const at::Tensor& mask = saved[3];
      return mask.defined() ? upstreams[i].masked_fill(mask.logical_not(), 0) : upstreams[i];
    };
    const auto kl = upstream(0), reverse_kl = upstream(1), entropy = upstream(2);
    variable_list gradients(4);
    if (!any) return gradients;
    const bool with_q = context->needs_input_grad(0), with_p = context->needs_input_grad(1);
    const auto support = context->saved_data["support"].toOptional<at::Tensor>();
    const variable_list out =
        CategoricalKlGradient::apply(saved[0], saved[1], support, saved[2], kl, reverse_kl, entropy,
                                     context->saved_data["temperature"].toDouble(), with_q, with_p);
    if (with_q) gradients[0] = out[0];
    if (with_p) gradients[1] = out[1];
    return gradients;
  }
};

}  // namespace

namespace detail {

CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options, const at::Tensor& support) {
  const variable_list out =
      CategoricalKlFunction::apply(q_logits, p_logits, input_of_graph(support), &options);
  return {out[0], out[1], out[2]};
}

}  // namespace detail

CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options) {
  return detail::with_public_errors([&]() -> CategoricalKl {
    face::check_arguments(kName, CategoricalKlInputs<at::Tensor>{q_logits, p_logits, options.mask});
    check_fields(kName, options);
    if (!q_logits.is_cpu() && !detail::row_kernels(q_logits)) {
      return detail::categorical_kl_any_device(q_logits, p_logits, options);
    }
    return detail::categorical_kl(q_logits, p_logits, options, {});
  });
}

}  // namespace tether
