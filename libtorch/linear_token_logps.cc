#include "libtorch/linear_token_logps.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/linear_checks.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/token_logps.h"

namespace tether {
namespace {

using detail::LinearInputs;
using detail::LinearSweep;
using detail::statistics_of;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "linear_token_logps";

// Every row is made, and those that are ignored are not read.
variable_list sweep_on_device(const LinearInputs& inputs, const LinearOptions& options,
                              const at::Tensor& statistics, at::IntArrayRef sizes,
                              at::Tensor& kept) {
  const detail::CudaKernels* kernels = detail::row_kernels(inputs.hidden);
  const auto all = detail::rows_on_device(statistics, inputs.targets.sizes(), options.entropies);
  LinearSweep sweep(inputs, {}, options);
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    kernels->row_statistics(chunk.logits, chunk.targets, chunk.support,
                            detail::row_options(options),
                            {chunk.of(all.states), chunk.of(all.logps), chunk.of(all.entropies)});
    if (sweep.chunks() == 1) kept = chunk.logits;
  }
  variable_list values = all.values();
  for (at::Tensor& each : values) each = each.view(sizes);
  return values;
}

// What has a gradient; `statistics` is filled. `kept` gets the logits if they are one chunk.
variable_list forward_sweep(const LinearInputs& inputs, const LinearOptions& options,
                            const at::Tensor& statistics, at::IntArrayRef sizes, at::Tensor& kept) {
  if (detail::row_kernels(inputs.hidden)) {
    return sweep_on_device(inputs, options, statistics, sizes, kept);
  }
  const RowOptions row = detail::row_options(options);
  RowStatistics* all = statistics_of(statistics);
  const int64_t* ids = inputs.targets.const_data_ptr<int64_t>();
  const auto rows = detail::VisitedRows::where(inputs.targets != row.ignore_index, inputs);
  for (int64_t i = 0; i < inputs.targets.numel(); ++i) {
    if (ids[i] == row.ignore_index) all[i] = ignored_row();
  }
  LinearSweep sweep(inputs, rows, options);
  const int64_t* places = rows.places.const_data_ptr<int64_t>();
  std::vector<RowStatistics> part;
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    part.resize(static_cast<size_t>(chunk.logits.size(0)));
    detail::statistics_of_rows(chunk.logits, chunk.targets, chunk.support, row, part.data());
    for (size_t k = 0; k < part.size(); ++k) all[places[chunk.begin + int64_t(k)]] = part[k];
    if (sweep.chunks() == 1) kept = chunk.logits;
  }
  return detail::values_of(statistics, sizes, detail::result_type(inputs.hidden), row,
                           options.entropies);
}

detail::LinearGradient backward_sweep(const LinearInputs& inputs, const LinearOptions& options,
                                      const at::Tensor& statistics,
                                      const std::optional<at::Tensor>& dlogps,
                                      const std::optional<at::Tensor>& dentropies,
                                      const at::Tensor& kept, detail::WantedLinear wanted) {
  const RowOptions row = detail::row_options(options);
  const auto type = statistics.scalar_type();
  const detail::RowUpstreams upstreams{detail::upstream_row(dlogps, type),
                                       detail::upstream_row(dentropies, type)};
  at::Tensor active = at::zeros_like(inputs.targets, at::kBool);
  for (const at::Tensor& upstream : {upstreams.dlogps, upstreams.dentropies}) {
    if (upstream.defined()) active = active | (upstream != 0);
  }
  active = active & (inputs.targets != row.ignore_index);
  LinearSweep sweep(inputs, detail::VisitedRows::where(active, inputs), options, kept);
  detail::LinearGradientSum sum(inputs, wanted, sweep.chunks());
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    detail::gradients_of_rows(chunk.logits, chunk.targets, chunk.support, row, chunk.of(statistics),
                              {chunk.of(upstreams.dlogps), chunk.of(upstreams.dentropies)},
                              chunk.logits);
    sum.add(chunk);
  }
  return sum.take();
}

// The gradient of LinearTokenLogps; a Function of its own so that a second backward raises.
class LinearGradientFunction : public Function<LinearGradientFunction> {
 public:
  using Maybe = std::optional<at::Tensor>;

  static variable_list forward(AutogradContext*, const at::Tensor& hidden, const at::Tensor& weight,
                               const Maybe& bias, const Maybe& dlogps, const Maybe& dentropies,
                               const at::Tensor& targets, const Maybe& support,
                               const at::Tensor& statistics, const at::Tensor* kept,
                               const LinearOptions* options, const detail::WantedLinear* wanted) {
    const LinearInputs inputs{hidden.reshape({targets.numel(), hidden.size(-1)}), weight,
                              bias.value_or(at::Tensor()), targets, support.value_or(at::Tensor())};
    const detail::LinearGradient gradient =
        backward_sweep(inputs, *options, statistics, dlogps, dentropies, *kept, *wanted);
    // A Function returns tensors only.
    const auto defined = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor : at::zeros({0}, hidden.options());
    };
    return {
        defined(gradient.hidden.defined() ? gradient.hidden.view(hidden.sizes()) : gradient.hidden),
        defined(gradient.weight), defined(gradient.bias)};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward(kName);
  }
};

class LinearTokenLogps : public Function<LinearTokenLogps> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& hidden,
                               const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const LinearInputs* rows, const LinearOptions* options,
                               const at::Tensor& statistics, at::IntArrayRef sizes) {
    at::Tensor logits;
    const variable_list values = forward_sweep(*rows, *options, statistics, sizes, logits);
    const bool differentiated =
        hidden.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
    context->saved_data["logits"] = differentiated ? logits : at::Tensor();
    context->save_for_backward({detail::savable(hidden), detail::savable(weight),
                                detail::savable(bias.value_or(at::Tensor()))});
    context->saved_data["targets"] = rows->targets;
    context->saved_data["support"] =
        rows->support.defined() ? c10::IValue(rows->support) : c10::IValue();
    context->saved_data["statistics"] = statistics;
    context->saved_data["options"] = detail::packed(*options);
    context->set_materialize_grads(false);
    return values;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto dlogps = detail::upstream_of(upstreams, 0);
    const auto dentropies = detail::upstream_of(upstreams, 1);
    variable_list gradients(7);
    if (!dlogps && !dentropies) return gradients;
    const auto& data = context->saved_data;
    const auto options = detail::unpacked<LinearOptions>(data.at("options"));
    const variable_list saved = context->get_saved_variables();
    const bool has_bias = saved[2].defined();
    const detail::WantedLinear wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                      has_bias && context->needs_input_grad(2)};
    // They become their gradient; another backward makes them again.
    const at::Tensor kept = data.at("logits").toTensor();
    context->saved_data["logits"] = at::Tensor();
    const variable_list out = LinearGradientFunction::apply(
        saved[0], saved[1], has_bias ? std::optional<at::Tensor>(saved[2]) : std::nullopt, dlogps,
        dentropies, data.at("targets").toTensor(), data.at("support").toOptional<at::Tensor>(),
        data.at("statistics").toTensor(), &kept, &options, &wanted);
    if (wanted.hidden) gradients[0] = out[0];
    if (wanted.weight) gradients[1] = out[1];
    if (wanted.bias) gradients[2] = out[2];
    return gradients;
  }
};

}  // namespace

namespace detail {

TokenLogps linear_token_logps_any_device(const at::Tensor& hidden, const LinearHead& head,
                                         const at::Tensor& targets, const LinearOptions& options) {
  // 0 times NaN would reach the gradient of the weight.
  const at::Tensor ignored = (targets == options.row.ignore_index).unsqueeze(-1);
  return token_logps_any_device(
      at::linear(hidden.masked_fill(ignored, 0), head.weight, head.bias), targets,
      {.row = options.row, .entropies = options.entropies, .statistics = options.statistics});
}

TokenLogps linear_token_logps(const LinearInputs& inputs, const LinearOptions& options) {
  const auto& [hidden, weight, bias, targets, support] = inputs;
  if (!hidden.is_cpu() && !row_kernels(hidden)) {
    return linear_token_logps_any_device(hidden, {weight, bias}, targets, options);
  }
  const LinearInputs rows = as_rows(inputs);
  const at::Tensor statistics = empty_statistics(targets.numel(), hidden);
  const variable_list values =
      LinearTokenLogps::apply(*input_of_graph(hidden), *input_of_graph(weight),
                              input_of_graph(bias), &rows, &options, statistics, targets.sizes());
  return token_logps_of(values, statistics, row_options(options));
}

}  // namespace detail

TokenLogps linear_token_logps(const at::Tensor& hidden, const LinearHead& head,
                              const at::Tensor& targets, const LinearOptions& options) {
  return detail::with_public_errors([&] {
    const LinearInputs inputs = detail::checked_linear(kName, hidden, head, targets, options);
    detail::check_targets(kName, inputs, options);
    return detail::linear_token_logps(inputs, options);
  });
}

}  // namespace tether
