#include "libtorch/linear_token_logps.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "libtorch/executor.h"
#include "libtorch/linear_checks.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/token_logps.h"

namespace tether {
namespace {

using detail::LinearInputs;
using detail::LinearSweep;
using detail::rows_of;
using detail::statistics_of;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "linear_token_logps";

at::Tensor rows_where(const at::Tensor& condition) { return at::nonzero(condition).view({-1}); }

// What a call shares between forward and backward, beside tensors.
struct Call {
  RowOptions row;
  detail::ChunkSize chunk;
};

// Returns the logits if they are one chunk.
at::Tensor forward_sweep(const LinearInputs& inputs, const Call& call,
                         const at::Tensor& statistics) {
  RowStatistics* all = statistics_of(statistics);
  const int64_t* ids = inputs.targets.const_data_ptr<int64_t>();
  const at::Tensor rows = rows_where(inputs.targets != call.row.ignore_index);
  for (int64_t i = 0; i < inputs.targets.numel(); ++i) {
    if (ids[i] == call.row.ignore_index) all[i] = ignored_row();
  }
  LinearSweep sweep(inputs, rows, call.chunk);
  const int64_t* places = rows.const_data_ptr<int64_t>();
  std::vector<RowStatistics> part;
  at::Tensor logits;
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    part.resize(static_cast<size_t>(chunk.logits.size(0)));
    row_statistics(rows_of(chunk.logits), chunk.targets.const_data_ptr<int64_t>(), call.row,
                   part.data(), torch_executor());
    for (size_t k = 0; k < part.size(); ++k) all[places[chunk.begin + int64_t(k)]] = part[k];
    logits = chunk.logits;
  }
  return sweep.chunks() == 1 ? logits : at::Tensor();
}

detail::LinearGradient backward_sweep(const LinearInputs& inputs, const Call& call,
                                      const at::Tensor& statistics,
                                      const std::optional<at::Tensor>& dlogps,
                                      const std::optional<at::Tensor>& dentropies,
                                      const at::Tensor& kept, detail::WantedLinear wanted) {
  const auto doubles = [](const std::optional<at::Tensor>& upstream) {
    return upstream ? upstream->reshape({-1}).to(at::kDouble) : at::Tensor();
  };
  const at::Tensor upstreams[] = {doubles(dlogps), doubles(dentropies)};
  at::Tensor active = at::zeros(inputs.targets.sizes(), at::dtype(at::kBool));
  for (const at::Tensor& upstream : upstreams) {
    if (upstream.defined()) active = active.logical_or(upstream != 0);
  }
  const at::Tensor rows = rows_where(active.logical_and(inputs.targets != call.row.ignore_index));
  const bool same_rows = kept.defined() && kept.size(0) == rows.numel();
  LinearSweep sweep(inputs, rows, call.chunk, same_rows ? kept : at::Tensor());
  detail::LinearGradientSum sum(inputs, wanted, sweep.chunks());
  for (int64_t i = 0; i < sweep.chunks(); ++i) {
    const LinearSweep::Chunk chunk = sweep.load(i);
    const int64_t end = chunk.begin + chunk.logits.size(0);
    const at::Tensor places = rows.slice(0, chunk.begin, end);
    const at::Tensor part = statistics.index_select(0, places);
    at::Tensor parts[2];
    const double* data[2] = {};
    for (int k = 0; k < 2; ++k) {
      if (!upstreams[k].defined()) continue;
      parts[k] = upstreams[k].index_select(0, places);
      data[k] = parts[k].const_data_ptr<double>();
    }
    row_gradients(rows_of(chunk.logits), chunk.targets.const_data_ptr<int64_t>(), call.row,
                  statistics_of(part), data[0], data[1], detail::writable(chunk.logits),
                  torch_executor());
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
                               const at::Tensor& targets, const at::Tensor& statistics,
                               const at::Tensor* kept, const Call* call,
                               const detail::WantedLinear* wanted) {
    const LinearInputs inputs{hidden.reshape({targets.numel(), hidden.size(-1)}), weight,
                              bias.value_or(at::Tensor()), targets};
    const detail::LinearGradient gradient =
        backward_sweep(inputs, *call, statistics, dlogps, dentropies, *kept, *wanted);
    // A Function returns tensors only.
    const auto defined = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor : at::zeros({0}, hidden.options());
    };
    return {
        defined(gradient.hidden.defined() ? gradient.hidden.view(hidden.sizes()) : gradient.hidden),
        defined(gradient.weight), defined(gradient.bias)};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, kName,
        ": the gradient must not be differentiated again, got a second backward. Detach it");
    return {};
  }
};

class LinearTokenLogps : public Function<LinearTokenLogps> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& hidden,
                               const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const LinearInputs* inputs, const Call* call,
                               const at::Tensor* statistics, const LinearOptions* options,
                               at::IntArrayRef sizes) {
    const at::Tensor logits = forward_sweep(*inputs, *call, *statistics);
    const bool differentiated =
        hidden.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
    context->saved_data["logits"] = differentiated ? logits : at::Tensor();
    context->save_for_backward({detail::savable(hidden), detail::savable(weight),
                                detail::savable(bias.value_or(at::Tensor()))});
    context->saved_data["targets"] = inputs->targets;
    context->saved_data["statistics"] = *statistics;
    context->saved_data["temperature"] = call->row.temperature;
    context->saved_data["scale"] = call->row.scale;
    context->saved_data["softcap"] = call->row.softcap;
    context->saved_data["ignore_index"] = call->row.ignore_index;
    context->saved_data["chunk_bytes"] = call->chunk.bytes;
    context->saved_data["rows_per_chunk"] = call->chunk.rows;
    context->set_materialize_grads(false);
    const auto type = detail::result_type(hidden);
    const auto logp_of = [&](const RowStatistics& of) { return logp(of, call->row); };
    variable_list results = {detail::from_rows(*statistics, sizes, type, logp_of)};
    if (options->entropies) {
      results.push_back(detail::from_rows(*statistics, sizes, type, entropy));
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto upstream = [&](size_t i) {
      const bool used = i < upstreams.size() && upstreams[i].defined();
      return used ? std::optional<at::Tensor>(upstreams[i]) : std::nullopt;
    };
    variable_list gradients(8);
    if (!upstream(0) && !upstream(1)) return gradients;
    const auto& data = context->saved_data;
    const Call call{{.temperature = data.at("temperature").toDouble(),
                     .scale = data.at("scale").toDouble(),
                     .softcap = data.at("softcap").toDouble(),
                     .ignore_index = data.at("ignore_index").toInt()},
                    {data.at("chunk_bytes").toInt(), data.at("rows_per_chunk").toInt()}};
    const variable_list saved = context->get_saved_variables();
    const bool has_bias = saved[2].defined();
    const detail::WantedLinear wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                      has_bias && context->needs_input_grad(2)};
    // They become their gradient; another backward makes them again.
    const at::Tensor kept = data.at("logits").toTensor();
    context->saved_data["logits"] = at::Tensor();
    const variable_list out = LinearGradientFunction::apply(
        saved[0], saved[1], has_bias ? std::optional<at::Tensor>(saved[2]) : std::nullopt,
        upstream(0), upstream(1), data.at("targets").toTensor(), data.at("statistics").toTensor(),
        &kept, &call, &wanted);
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
  const at::Tensor ignored = (targets == options.ignore_index).unsqueeze(-1);
  return token_logps_any_device(at::linear(hidden.masked_fill(ignored, 0), head.weight, head.bias),
                                targets, token_options(options));
}

}  // namespace detail

TokenLogps linear_token_logps(const at::Tensor& given_hidden, const LinearHead& given_head,
                              const at::Tensor& targets, const LinearOptions& options) {
  const auto [hidden, head] = detail::in_one_type(given_hidden, given_head);
  const LinearInputs inputs = detail::checked_linear(kName, hidden, head, targets, options);
  if (!hidden.is_cpu()) {
    return detail::linear_token_logps_any_device(hidden, head, inputs.targets.view(targets.sizes()),
                                                 options);
  }
  const Call call{detail::row_options(options), detail::chunk_size(options)};
  const at::Tensor statistics = detail::empty_statistics(inputs.targets.numel());
  const variable_list results = LinearTokenLogps::apply(
      *detail::input_of_graph(hidden), *detail::input_of_graph(head.weight),
      detail::input_of_graph(head.bias), &inputs, &call, &statistics, &options, targets.sizes());
  TokenLogps out = {.logps = results[0]};
  if (options.entropies) out.entropies = results[1];
  if (options.statistics)
    detail::add_statistics(statistics, targets.sizes(), call.row, hidden, out);
  return out;
}

}  // namespace tether
