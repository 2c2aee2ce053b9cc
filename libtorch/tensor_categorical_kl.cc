#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "estimators/kl/forms.h"
#include "libtorch/arrays.h"
#include "libtorch/categorical_kl.h"
#include "libtorch/flat_batch.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/tensor_number.h"

// Divergences of two rows (logits/pair_kl.h) by torch's operations, for any device.

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Rows of zeros where the mask is 0.
at::Tensor log_softmax(const at::Tensor& logits, const std::optional<at::Tensor>& mask,
                       double temperature) {
  at::Tensor x = logits.to(detail::result_type(logits));
  if (mask) x = x.masked_fill(mask->logical_not().unsqueeze(-1), 0);
  // Less the largest, before the temperature multiplies rounding; over it no finite one overflows.
  const double farthest = x.scalar_type() == at::kDouble ? 0x1p900 : 0x1p110;
  const at::Tensor below = (x - x.amax(-1, true)).clamp_min(-farthest * std::min(temperature, 1.0));
  const at::Tensor absent = x == -std::numeric_limits<double>::infinity();
  return at::log_softmax(at::where(absent, x, below) / temperature, -1);
}

// The slopes of a row, which sum to 0. That of a column with most of the weight, whose terms
// cancel, is minus the sum of the others.
at::Tensor summing_to_0(const at::Tensor& slopes, const at::Tensor& weight) {
  const at::Tensor largest = weight.argmax(-1, /*keepdim=*/true);
  const at::Tensor others = slopes.scatter(-1, largest, 0).sum(-1, /*keepdim=*/true);
  const at::Tensor slope = slopes.gather(-1, largest);  // NaN stays
  const at::Tensor own = at::where(weight.gather(-1, largest) > 0.5, 0 * slope - others, slope);
  return slopes.scatter(-1, largest, own);
}

// KL(q || p), and its slopes by the logits of q: q_v (log q_v - log p_v - KL), NaN where it is
// infinite and q_v does not count as 0.
struct Divergence {
  at::Tensor value, slopes;

  Divergence(const at::Tensor& log_q, const at::Tensor& log_p) {
    constexpr double kLeastProbability = 0x1p-100;
    const at::Tensor q = log_q.exp(), p = log_p.exp(), gap = log_q - log_p, near = gap.abs() < 0.5;
    const at::Tensor alone = (q < kLeastProbability).logical_and(gap.isinf());
    const at::Tensor d = gap.masked_fill((q == 0).logical_or(alone), 0), zero = at::zeros_like(d);
    const at::Tensor terms = q * d, total = terms.sum(-1);
    // With sum_v (p_v - q_v) = 0 added: no term is below 0, and none cancels.
    const at::Tensor small = q * k3(TensorNumber{at::where(near, -d, zero)}).value;
    const at::Tensor all = at::where(near, small, (p - q) + terms).sum(-1);
    value = at::where(at::isfinite(total), all, total);
    const at::Tensor away = d - (value + 0 * value).unsqueeze(-1);
    const double least = q.scalar_type() == at::kDouble ? 0x1p-998 : 0x1p-102;
    slopes = summing_to_0(at::where(q < least, 0 * q, q * away), q);
  }
};

// Both rows, with the slopes over 1 / temperature.
struct TensorPair {
  at::Tensor log_q, q, p;
  at::Tensor broken;  // NaN where one of the rows is, else 0
  Divergence forward, reverse;

  TensorPair(const at::Tensor& q_logits, const at::Tensor& p_logits,
             const std::optional<at::Tensor>& mask, double temperature)
      : TensorPair(log_softmax(q_logits, mask, temperature),
                   log_softmax(p_logits, mask, temperature)) {}

  at::Tensor entropy() const { return -(q * log_q).sum(-1).clamp_max(0); }
  at::Tensor entropy_slopes() const {
    return summing_to_0(-q * (log_q + entropy().unsqueeze(-1)), q) + broken;
  }
  // Of KL(q || p) by the logits of p, and minus those of KL(p || q) by q's.
  at::Tensor moved() const { return summing_to_0(p - q, at::minimum(q, p)) + broken; }

 private:
  TensorPair(const at::Tensor& of_q, const at::Tensor& of_p)
      : q(of_q.exp()), p(of_p.exp()), forward(of_q, of_p), reverse(of_p, of_q) {
    broken = 0 * (q + p);
    forward.slopes = forward.slopes + broken;
    reverse.slopes = reverse.slopes + broken;
    log_q = of_q.masked_fill(q == 0, 0);
  }
};

// What is exactly 0 on one side stays 0, whatever the other one is.
at::Tensor times(const std::optional<at::Tensor>& upstream, const at::Tensor& slopes) {
  if (!upstream) return at::zeros_like(slopes);
  const at::Tensor each = upstream->unsqueeze(-1);
  return at::where((each == 0).logical_or(slopes == 0), at::zeros_like(slopes), each * slopes);
}

// A Function of its own so that a second backward raises.
class TensorKlGradient : public Function<TensorKlGradient> {
 public:
  using Upstream = std::optional<at::Tensor>;

  static variable_list forward(AutogradContext*, const at::Tensor& q, const at::Tensor& p,
                               const Upstream& mask, const Upstream& kl, const Upstream& reverse_kl,
                               const Upstream& entropy, double temperature) {
    const TensorPair pair(q, p, mask, temperature);
    const at::Tensor moved = pair.moved();
    const at::Tensor dq = times(kl, pair.forward.slopes) - times(reverse_kl, moved) +
                          times(entropy, pair.entropy_slopes());
    const at::Tensor dp =
        times(kl, moved) + times(reverse_kl, pair.reverse.slopes) + times(entropy, pair.broken);
    return {(dq / temperature).to(q.scalar_type()), (dp / temperature).to(p.scalar_type())};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward("categorical_kl");
  }
};

class TensorKl : public Function<TensorKl> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& p,
                               const std::optional<at::Tensor>& mask, double temperature) {
    const TensorPair pair(q, p, mask, temperature);
    context->save_for_backward(
        {detail::savable(q), detail::savable(p), mask ? detail::savable(*mask) : at::Tensor()});
    context->saved_data["temperature"] = temperature;
    context->set_materialize_grads(false);
    variable_list out = {pair.forward.value, pair.reverse.value, pair.entropy()};
    if (mask) {
      for (at::Tensor& each : out) each = each.masked_fill(mask->logical_not(), 0);
    }
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const variable_list saved = context->get_saved_variables();
    const auto mask = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const auto upstream = [&](size_t i) -> std::optional<at::Tensor> {
      if (!upstreams[i].defined()) return std::nullopt;
      return mask ? upstreams[i].masked_fill(mask->logical_not(), 0) : upstreams[i];
    };
    const variable_list out =
        TensorKlGradient::apply(saved[0], saved[1], mask, upstream(0), upstream(1), upstream(2),
                                context->saved_data["temperature"].toDouble());
    return {out[0], out[1], at::Tensor(), at::Tensor()};
  }
};

}  // namespace

CategoricalKl detail::categorical_kl_any_device(const at::Tensor& q_logits,
                                                const at::Tensor& p_logits,
                                                const CategoricalKlOptions& options) {
  const auto mask = options.mask.defined() ? std::optional(options.mask) : std::nullopt;
  const variable_list out = TensorKl::apply(q_logits, p_logits, mask, options.temperature);
  return {out[0], out[1], out[2]};
}

}  // namespace tether
