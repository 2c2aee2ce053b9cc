#include "libtorch/value_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/token_checks.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_on_cpu(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  if (tensor.is_cpu()) return;
  detail::check_value(
      false, detail::named(function, name) + " must be on cpu, got " + tensor.device().str());
}

void check_like_values(std::string_view name, const at::Tensor& tensor, const at::Tensor& values) {
  if (!tensor.defined()) return;
  detail::check_floating("value_loss", name, tensor);
  detail::check_device("value_loss", name, tensor, "values", values);
  detail::check_constant("value_loss", name, tensor);
  if (tensor.sizes() == values.sizes()) return;
  detail::check_value(false, detail::named("value_loss", name) + " must be " +
                                 detail::shape_text(values.sizes()) + " like values, got " +
                                 detail::shape_text(tensor.sizes()));
}

ValueBatch checked(const ValueBatch& batch) {
  const auto function = "value_loss";
  detail::check_given(function, "values", batch.values);
  detail::check_floating(function, "values", batch.values);
  check_on_cpu(function, "values", batch.values);
  if (batch.values.dim() != (batch.offsets.defined() ? 1 : 2)) {
    detail::check_value(false, "value_loss: values must be [B, T], or [N] with offsets, got " +
                                   detail::shape_text(batch.values.sizes()));
  }
  detail::check_given(function, "returns", batch.returns);
  check_like_values("returns", batch.returns, batch.values);
  check_like_values("old_values", batch.old_values, batch.values);
  ValueBatch out = batch;
  detail::check_rows_mask(function, batch.response_mask, "values", batch.values);
  out.response_mask = detail::as_weights(batch.response_mask);
  out.offsets = detail::checked_offsets(function, batch.offsets, batch.values, "values");
  return out;
}

class ValueLoss : public torch::autograd::Function<ValueLoss> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& values,
                            const ValueBatch* batch, const ValueObjective* objective,
                            const Normalizer* normalizer, ValueMetrics* metrics) {
    ValueArrays arrays{.layout = detail::layout_of(batch->values, batch->offsets),
                       .values = detail::token_array(batch->values),
                       .returns = detail::token_array(batch->returns),
                       .response_mask = detail::token_array(batch->response_mask)};
    if (batch->old_values.defined()) arrays.old_values = detail::token_array(batch->old_values);
    at::Tensor dvalues;
    MutableArray gradient;
    if (values.requires_grad()) {
      dvalues = at::empty(values.sizes(), at::dtype(detail::stored_type(values)));
      gradient = detail::mutable_token_array(dvalues);
    }
    const ValueTotals totals =
        value_loss(arrays, *objective, *normalizer, gradient, torch_executor());
    *metrics = totals.metrics;
    context->save_for_backward({dvalues, values.requires_grad() ? values : at::Tensor()});
    const bool wide = values.scalar_type() == at::kDouble;
    return at::scalar_tensor(totals.loss, at::dtype(wide ? at::kDouble : at::kFloat));
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return {detail::scaled("value_loss", gradients[0], saved[0], saved[1]), {}, {}, {}, {}};
  }
};

}  // namespace

ValueOutput value_loss(const ValueBatch& unchecked, const ValueObjective& objective,
                       const Normalizer& normalizer) {
  const ValueBatch batch = checked(unchecked);
  return detail::with_value_errors([&] {
    ValueOutput out;
    out.loss = ValueLoss::apply(*detail::input_of_graph(batch.values), &batch, &objective,
                                &normalizer, &out.metrics);
    return out;
  });
}

at::Tensor whiten(const at::Tensor& values, const at::Tensor& response_mask,
                  const Whitening& options) {
  const auto function = "whiten";
  detail::check_given(function, "values", values);
  detail::check_floating(function, "values", values);
  detail::check_constant(function, "values", values);
  check_on_cpu(function, "values", values);
  if (values.dim() < 1 || values.dim() > 2) {
    detail::check_value(
        false, "whiten: values must be [B, T] or [N], got " + detail::shape_text(values.sizes()));
  }
  detail::check_rows_mask(function, response_mask, "values", values);
  const at::Tensor weights = detail::as_weights(response_mask);
  const bool padded = values.dim() == 2;
  const at::Tensor rows = padded ? values : values.unsqueeze(0);
  const at::Tensor mask = padded ? weights : weights.unsqueeze(0);
  const RowLayout layout{.rows = rows.size(0), .columns = rows.size(1)};
  const at::Tensor out = at::empty(rows.sizes(), at::dtype(values.scalar_type()));
  return detail::with_value_errors([&] {
    const ConstArray active = detail::token_array(mask), array = detail::token_array(rows);
    whiten(layout, array, active, moments(layout, array, active), options,
           detail::mutable_token_array(out));
    return padded ? out : out.squeeze(0);
  });
}

}  // namespace tether
