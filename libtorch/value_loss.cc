#include "libtorch/value_loss.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/stored_gradient.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_on_cpu(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  detail::check_value(tensor.is_cpu(),
                      named(function, name) + " must be on cpu, got " + tensor.device().str());
}

class ValueLoss : public torch::autograd::Function<ValueLoss> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& values,
                            const ValueBatch* batch, const ValueObjective* objective,
                            const Normalizer* normalizer, ValueMetrics* metrics) {
    at::Tensor dvalues;
    MutableArray gradient;
    if (values.requires_grad()) {
      dvalues = at::empty(values.sizes(), at::dtype(detail::stored_type(values)));
      gradient = face::mutable_token_array(dvalues);
    }
    const ValueTotals totals = value_loss(face::arrays_of("value_loss", *batch), *objective,
                                          *normalizer, gradient, torch_executor());
    *metrics = totals.metrics;
    context->save_for_backward({dvalues, values.requires_grad() ? values : at::Tensor()});
    return detail::result_scalar(totals.loss, values);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return {detail::scaled("value_loss", gradients[0], saved[0], saved[1]), {}, {}, {}, {}};
  }
};

}  // namespace

ValueOutput value_loss(const ValueBatch& given, const ValueObjective& objective,
                       const Normalizer& normalizer) {
  return detail::with_public_errors([&] {
    const ValueBatch batch = detail::checked("value_loss", given);
    check_on_cpu("value_loss", "values", batch.values);
    ValueOutput out;
    out.loss = ValueLoss::apply(*detail::input_of_graph(batch.values), &batch, &objective,
                                &normalizer, &out.metrics);
    return out;
  });
}

at::Tensor whiten(const at::Tensor& values, const at::Tensor& response_mask,
                  const Whitening& options) {
  return detail::with_public_errors([&] {
    const auto batch = detail::checked(
        "whiten", WhiteningInputs<at::Tensor>{.values = values, .response_mask = response_mask});
    check_on_cpu("whiten", "values", values);
    const at::Tensor out = at::empty(values.sizes(), at::dtype(values.scalar_type()));
    const WhiteningArrays arrays = face::arrays_of("whiten", batch);
    whiten(arrays, moments(arrays), options, face::mutable_token_array(out));
    return out;
  });
}

}  // namespace tether
