#include "libtorch/token_logps.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/rows.h"
#include "libtorch/arrays.h"
#include "libtorch/executor.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "token_logps";
constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(double);
static_assert(sizeof(RowStatistics) == kStatistics * sizeof(double));

at::ScalarType result_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

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
  check_type(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
             name + ": targets must be int32 or int64, got " + dtype_text(targets.scalar_type()));
  check_device(name, "targets", targets, "logits", logits);
  const at::IntArrayRef expected = logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
  check_value(targets.sizes() == expected, name + ": targets must be " + shape_text(expected) +
                                               " like logits " + shape_text(logits.sizes()) +
                                               ", got " + shape_text(targets.sizes()));
}

// The index of element `i` of a contiguous tensor of this shape.
std::vector<int64_t> unravelled(int64_t i, at::IntArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; i /= sizes[d]) index[d] = i % sizes[d];
  return index;
}

// `targets`: int64, contiguous, on the CPU.
void check_ids(const at::Tensor& targets, int64_t vocabulary, int64_t ignore_index) {
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const int64_t bad = first_bad_target(ids, targets.numel(), vocabulary, ignore_index);
  if (bad == targets.numel()) return;
  TORCH_CHECK_INDEX(false, kName, ": targets must be in [0, ", vocabulary, ") or ignore_index ",
                    ignore_index, ", got ", ids[bad], " at ",
                    detail::shape_text(unravelled(bad, targets.sizes())));
}

// ---- logits as rows -----------------------------------------------------------------------------

// The rows of a tensor [..., V]: leading dimensions that lie end to end are one. A vocabulary of 0
// says that more than two are left, which rows cannot express.
ConstLogits rows_of(const at::Tensor& logits) {
  ConstLogits rows = {.dtype = detail::row_array(logits).dtype,
                      .rows = logits.numel() / logits.size(-1),
                      .vocabulary = logits.size(-1),
                      .stride = logits.stride(-1)};
  if (rows.rows == 0) return rows;
  int levels = 0;
  int64_t inner = 1;  // rows in the dimensions seen so far, the last one first
  for (int64_t d = logits.dim() - 2; d >= 0; --d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    if (size == 1) continue;
    if (levels == 0) {
      rows.row_stride = stride;
      levels = 1;
    } else if (levels == 1 && stride != inner * rows.row_stride) {
      rows.columns = inner;
      rows.batch_stride = stride;
      levels = 2;
    } else if (levels == 2 && stride != inner / rows.columns * rows.batch_stride) {
      return {};
    }
    inner *= size;
  }
  rows.data = logits.const_data_ptr();
  return rows;
}

// `logits` itself or, for the rare layouts that need it, a contiguous copy.
at::Tensor with_rows(const at::Tensor& logits) {
  return rows_of(logits).vocabulary == 0 ? logits.contiguous() : logits;
}

// ---- autograd -----------------------------------------------------------------------------------

RowStatistics* statistics_of(const at::Tensor& tensor) {
  return reinterpret_cast<RowStatistics*>(tensor.data_ptr<double>());
}

RowOptions row_options(double temperature, int64_t ignore_index) {
  return {.temperature = temperature, .ignore_index = ignore_index};
}

// The gradient of TokenLogpsFunction; a Function of its own so that a second backward raises
// instead of taking the gradient for a constant.
class TokenLogpsGradient : public Function<TokenLogpsGradient> {
 public:
  using Upstream = std::optional<at::Tensor>;  // none where an output was not used

  static at::Tensor forward(AutogradContext*, const at::Tensor& logits, const at::Tensor& targets,
                            const at::Tensor& statistics, const Upstream& dlogps,
                            const Upstream& dentropies, double temperature, int64_t ignore_index) {
    const at::Tensor in = with_rows(logits);
    at::Tensor dlogits = at::empty_like(logits, at::MemoryFormat::Contiguous);
    const at::Tensor upstreams[] = {doubles(dlogps), doubles(dentropies)};
    const int64_t vocabulary = logits.size(-1);
    row_gradients(rows_of(in), targets.const_data_ptr<int64_t>(),
                  row_options(temperature, ignore_index), statistics_of(statistics),
                  data(upstreams[0]), data(upstreams[1]),
                  {.data = dlogits.data_ptr(),
                   .dtype = rows_of(in).dtype,
                   .rows = targets.numel(),
                   .vocabulary = vocabulary,
                   .row_stride = vocabulary},
                  torch_executor());
    return dlogits;
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

// targets: int64, contiguous.
class TokenLogpsFunction : public Function<TokenLogpsFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& logits,
                               const at::Tensor& targets, double temperature, int64_t ignore_index,
                               bool with_entropies) {
    const at::Tensor in = with_rows(logits);
    const at::Tensor statistics =
        at::empty({targets.numel(), kStatistics}, logits.options().dtype(at::kDouble));
    row_statistics(rows_of(in), targets.const_data_ptr<int64_t>(),
                   row_options(temperature, ignore_index), statistics_of(statistics),
                   torch_executor());
    context->save_for_backward({logits, targets, statistics});
    context->saved_data["temperature"] = temperature;
    context->saved_data["ignore_index"] = ignore_index;
    context->set_materialize_grads(false);
    const auto logp_of = [=](const RowStatistics& row) { return logp(row, temperature); };
    variable_list results = {from_rows(statistics, logits, targets, logp_of)};
    if (with_entropies) results.push_back(from_rows(statistics, logits, targets, entropy));
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const auto upstream = [&](size_t i) {
      const bool used = i < upstreams.size() && upstreams[i].defined();
      return used ? TokenLogpsGradient::Upstream(upstreams[i]) : std::nullopt;
    };
    variable_list gradients(5);
    if (!upstream(0) && !upstream(1)) return gradients;
    const variable_list saved = context->get_saved_variables();
    gradients[0] = TokenLogpsGradient::apply(saved[0], saved[1], saved[2], upstream(0), upstream(1),
                                             context->saved_data["temperature"].toDouble(),
                                             context->saved_data["ignore_index"].toInt());
    return gradients;
  }

 private:
  template <class Value>
  static at::Tensor from_rows(const at::Tensor& statistics, const at::Tensor& logits,
                              const at::Tensor& targets, Value value) {
    const at::Tensor out = at::empty(targets.sizes(), logits.options().dtype(at::kDouble));
    const RowStatistics* rows = statistics_of(statistics);
    double* values = out.data_ptr<double>();
    for (int64_t row = 0; row < targets.numel(); ++row) values[row] = value(rows[row]);
    return out.to(result_type(logits));
  }
};

}  // namespace

namespace detail {

TokenLogps token_logps_any_device(const at::Tensor& logits, const at::Tensor& targets,
                                  const TokenLogpsOptions& options) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  const at::Tensor ignored = targets == options.ignore_index;
  // Filling -inf with -inf and ignored rows with 0 cuts the gradient there.
  at::Tensor x = logits.to(result_type(logits));
  x = x.masked_fill(x == minus_infinity, minus_infinity).masked_fill(ignored.unsqueeze(-1), 0);
  const at::Tensor log_p = at::log_softmax(x / options.temperature, -1);
  const at::Tensor index = targets.masked_fill(ignored, 0).unsqueeze(-1);
  TokenLogps out = {.logps = log_p.gather(-1, index).squeeze(-1).masked_fill(ignored, 0),
                    .entropies = {}};
  if (options.entropies) {
    const at::Tensor finite = log_p.masked_fill(log_p == minus_infinity, 0);
    out.entropies = -(log_p.exp() * finite).sum(-1).masked_fill(ignored, 0);
  }
  return out;
}

}  // namespace detail

TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options) {
  check_tensors(logits, targets);
  detail::with_value_errors([&] { check_fields(kName, row_options(options.temperature, 0)); });
  const at::Tensor ids = targets.to(at::kLong).contiguous();
  check_ids(ids.cpu(), logits.size(-1), options.ignore_index);
  if (!logits.is_cpu()) return detail::token_logps_any_device(logits, ids, options);
  const variable_list results = TokenLogpsFunction::apply(logits, ids, options.temperature,
                                                          options.ignore_index, options.entropies);
  return {.logps = results[0], .entropies = options.entropies ? results[1] : at::Tensor()};
}

}  // namespace tether
