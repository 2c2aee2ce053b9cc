#include "libtorch/stored_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>

#include "libtorch/arrays.h"

namespace tether::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor product(const at::Tensor& stored, const at::Tensor& upstream) {
  if (upstream.is_cpu() && std::isfinite(upstream.item<double>())) return stored * upstream;
  return at::where(stored == 0, stored, stored * upstream);
}

[[noreturn]] void refuse_second_derivative(const std::string& function) {
  C10_THROW_ERROR(
      NotImplementedError,
      function + ": backward must run once, got a second derivative. The loss has none");
}

class StoredGradient : public torch::autograd::Function<StoredGradient> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& upstream,
                            const at::Tensor& stored, const at::Tensor& input,
                            const std::string& function) {
    context->saved_data["function"] = function;
    return product(stored, upstream).to(input.scalar_type());
  }
  static variable_list backward(AutogradContext* context, const variable_list&) {
    refuse_second_derivative(context->saved_data["function"].toStringRef());
  }
};

// A gradient, which depends on the tensor that it is of as far as torch can tell.
class Refused : public torch::autograd::Function<Refused> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gradient, const at::Tensor&,
                            const std::string& function) {
    context->saved_data["function"] = function;
    return gradient.view_as(gradient);
  }
  static variable_list backward(AutogradContext* context, const variable_list&) {
    refuse_second_derivative(context->saved_data["function"].toStringRef());
  }
};

class Once : public torch::autograd::Function<Once> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor,
                            const std::string& function) {
    context->saved_data["function"] = function;
    context->save_for_backward({tensor});
    return tensor.view_as(tensor);
  }
  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    at::Tensor gradient = upstream[0];
    if (at::GradMode::is_enabled()) {
      const at::Tensor tensor = context->get_saved_variables()[0];
      gradient = Refused::apply(gradient, tensor, context->saved_data["function"].toStringRef());
    }
    return {gradient, {}};
  }
};

}  // namespace

at::ScalarType stored_type(const at::Tensor& input) {
  return input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
}

at::Tensor gradient_memory(bool wanted, const at::Tensor& input, MutableArray& view) {
  if (!wanted) return {};
  const auto options = at::dtype(stored_type(input)).device(input.device());
  const at::Tensor out = at::empty(input.sizes(), options);
  view = face::mutable_token_array(out);
  return out;
}

at::Tensor scaled(const char* function, const at::Tensor& upstream, const at::Tensor& stored,
                  const at::Tensor& input) {
  if (!stored.defined()) return {};
  if (at::GradMode::is_enabled()) {
    return StoredGradient::apply(upstream, stored, input, std::string(function));
  }
  if (!upstream.is_cpu() || upstream.item<double>() != 1) {
    return product(stored, upstream).to(input.scalar_type());
  }
  // Of a graph that stays, a copy: the caller may change what it gets.
  const bool stays = torch::autograd::get_current_graph_task_keep_graph();
  return stored.to(input.scalar_type(), /*non_blocking=*/false, /*copy=*/stays);
}

at::Tensor once_differentiable(const char* function, const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.requires_grad()) return tensor;
  return Once::apply(tensor, std::string(function));
}

void refuse_second_backward(const char* function) {
  C10_THROW_ERROR(NotImplementedError,
                  std::string(function) +
                      ": the gradient must not be differentiated again, got a second backward. "
                      "Detach it, or use torch.log_softmax for second derivatives");
}

at::Tensor savable(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_inference()) return tensor;
  const c10::InferenceMode normal(false);
  return tensor.clone();
}

std::optional<at::Tensor> input_of_graph(const at::Tensor& tensor) {
  if (!tensor.defined()) return std::nullopt;
  return at::GradMode::is_enabled() ? tensor : tensor.detach();
}

}  // namespace tether::detail
