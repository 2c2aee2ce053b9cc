#include "libtorch/arrays.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#include <cstring>

namespace tether {
namespace detail {

std::string shape_text(at::IntArrayRef sizes) {
  std::string out;
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + text(sizes[i]);
  return in_brackets(out);
}

std::string dtype_text(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

void check_value(bool holds, const std::string& message) { TORCH_CHECK_VALUE(holds, message); }

void check_type(bool holds, const std::string& message) { TORCH_CHECK_TYPE(holds, message); }

at::ScalarType result_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor result_scalar(double value, const at::Tensor& input) {
  const at::ScalarType type = result_type(input);
  const DType dtype = type == at::kDouble ? DType::float64 : DType::float32;
  return at::scalar_tensor(representable(value, dtype), at::dtype(type));
}

void copy_block(std::string_view function, const at::Tensor& block, double* out, size_t size) {
  check_value(block.defined() && block.numel() == static_cast<int64_t>(size),
              std::string(function) +
                  ": metrics must be the block of a loss, got a tensor of another size");
  const at::Tensor host = block.detach().to(at::kCPU, at::kDouble).contiguous();
  std::memcpy(out, host.const_data_ptr(), size * sizeof(double));
}

at::Tensor as_weights(const at::Tensor& mask) {
  const bool integers = at::isIntegralType(mask.scalar_type(), /*includeBool=*/false);
  return integers ? mask.to(at::kFloat) : mask;
}

}  // namespace detail

face::Element face::Access<at::Tensor>::element(const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  Element out{.name = detail::dtype_text(type)};
  out.integer = at::isIntegralType(type, /*includeBool=*/false);
  out.index = type == at::kInt || type == at::kLong;
  if (type == at::kFloat) out.dtype = DType::float32;
  if (type == at::kDouble) out.dtype = DType::float64;
  if (type == at::kBFloat16) out.dtype = DType::bfloat16;
  if (type == at::kHalf) out.dtype = DType::float16;
  if (type == at::kBool) out.dtype = DType::boolean;
  if (type == at::kInt) out.dtype = DType::int32;
  if (type == at::kLong) out.dtype = DType::int64;
  return out;
}

void face::Access<at::Tensor>::check_gradient(const std::string& where, std::string_view name,
                                              const at::Tensor& tensor, Flow flow) {
  detail::check_type(!tensor.is_nested(), where + " must be a dense tensor, got a nested one");
  detail::check_type(tensor.layout() == at::kStrided,
                     where + " must be a dense tensor, got another layout");
  if (tensor._fw_grad(/*level=*/0).defined()) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, where,
                                " must have no tangent, got one. Forward-mode derivatives are not "
                                "supported: use backward");
  }
  if (flow == Flow::differentiable || !tensor.requires_grad()) return;
  detail::check_value(false, where +
                                 " must not require grad, got a tensor that does. It is a constant "
                                 "of the loss: pass " +
                                 std::string(name) + ".detach()");
}

}  // namespace tether
