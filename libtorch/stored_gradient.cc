#include "libtorch/stored_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

namespace tether::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor product(const at::Tensor& stored, const at::Tensor& upstream) {
  if (upstream.is_cpu() && std::isfinite(upstream.item<double>())) return stored * upstream;
  return at::where(stored == 0, stored, stored * upstream);
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
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, context->saved_data["function"].toStringRef(),
        ": backward must run once, got a second derivative. The loss has none");
  }
};

}  // namespace

at::ScalarType stored_type(const at::Tensor& input) {
  return input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
}

at::Tensor scaled(const char* function, const at::Tensor& upstream, const at::Tensor& stored,
                  const at::Tensor& input) {
  if (!stored.defined()) return {};
  if (at::GradMode::is_enabled()) {
    return StoredGradient::apply(upstream, stored, input, std::string(function));
  }
  const bool once = upstream.is_cpu() && upstream.item<double>() == 1;
  return (once ? stored : product(stored, upstream)).to(input.scalar_type());
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
