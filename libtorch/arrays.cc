#include "libtorch/arrays.h"

#include <c10/util/Exception.h>

namespace tether::detail {

std::string shape_text(at::IntArrayRef sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + text(sizes[i]);
  return out + "]";
}

std::string dtype_text(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

void check_value(bool holds, const std::string& message) { TORCH_CHECK_VALUE(holds, message); }

void check_type(bool holds, const std::string& message) { TORCH_CHECK_TYPE(holds, message); }

namespace {

std::string named(std::string_view function, std::string_view name) {
  return std::string(function) + ": " + std::string(name);
}

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kBool:
      return DType::boolean;
    case at::kFloat:
      return DType::float32;
    default:
      throw Error("tensor must be floating or bool, got " + dtype_text(tensor.scalar_type()));
  }
}

template <class Array, class Pointer>
Array token_view(const at::Tensor& tensor, Pointer* data) {
  const bool padded = tensor.dim() == 2;
  return {.data = data,
          .dtype = dtype_of(tensor),
          .row_stride = padded ? tensor.stride(0) : 0,
          .column_stride = tensor.stride(padded ? 1 : 0)};
}

}  // namespace

void check_floating(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  if (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf) {
    if (!tensor._fw_grad(/*level=*/0).defined()) return;
    TORCH_CHECK_NOT_IMPLEMENTED(false, named(function, name),
                                " must have no tangent, got one. Forward-mode derivatives are not "
                                "supported: use backward");
  }
  check_type(false, named(function, name) + " must be float32, float64, bfloat16 or float16, got " +
                        dtype_text(type));
}

void check_constant(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  if (!tensor.requires_grad()) return;
  check_value(false, named(function, name) +
                         " must not require grad, got a tensor that does. It is a constant of the "
                         "loss: pass " +
                         std::string(name) + ".detach()");
}

void check_device(std::string_view function, std::string_view name, const at::Tensor& tensor,
                  std::string_view like_name, const at::Tensor& like) {
  if (tensor.device() == like.device()) return;
  check_value(false, named(function, name) + " must be on " + like.device().str() + " like " +
                         std::string(like_name) + ", got " + tensor.device().str());
}

ConstArray token_array(const at::Tensor& tensor) {
  return token_view<ConstArray>(tensor, tensor.const_data_ptr());
}

MutableArray mutable_token_array(const at::Tensor& tensor) {
  return token_view<MutableArray>(tensor, tensor.data_ptr());
}

ConstArray row_array(const at::Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .dtype = dtype_of(tensor),
          .row_stride = tensor.stride(0),
          .column_stride = 0,
          .per_row = true};
}

}  // namespace tether::detail
