#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "../core/batch.h"
#include "../core/check.h"

// What every door of the LibTorch face needs: errors, checks, and views of tensors.

namespace tether::detail {

// "[4, 128]" and "float32"
std::string shape_text(at::IntArrayRef sizes);
std::string dtype_text(at::ScalarType type);

// Python sees these as ValueError and TypeError.
void check_value(bool holds, const std::string& message);
void check_type(bool holds, const std::string& message);

// Throws unless the tensor is a floating-point one (float32, float64, bfloat16, float16).
void check_floating(std::string_view function, std::string_view name, const at::Tensor& tensor);

// Throws if a tensor that is a constant of the formulas asks for a gradient.
void check_constant(std::string_view function, std::string_view name, const at::Tensor& tensor);

// Throws unless `tensor` lies on the device of `like`.
void check_device(std::string_view function, std::string_view name, const at::Tensor& tensor,
                  std::string_view like_name, const at::Tensor& like);

// A view of a tensor of tokens, [B, T] or packed [N], or of one value per row, [B].
ConstArray token_array(const at::Tensor& tensor);
ConstArray row_array(const at::Tensor& tensor);
MutableArray mutable_token_array(const at::Tensor& tensor);

// Runs `body`; an Error of the core comes out as ValueError.
template <class Body>
auto with_value_errors(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    check_value(false, error.what());
    throw;
  }
}

}  // namespace tether::detail
