#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "../core/batch.h"
#include "../core/check.h"
#include "../face/arguments.h"

// What every door of the LibTorch face needs: errors, and tensors as the arrays of a function.

namespace tether {

template <>
struct face::Access<at::Tensor> {
  static Element element(const at::Tensor& tensor);
  static std::string device(const at::Tensor& tensor) { return tensor.device().str(); }
  // Nothing has a tangent; what no gradient flows into does not ask for one.
  static void check_gradient(const std::string& where, std::string_view name,
                             const at::Tensor& tensor, Flow flow);
};

namespace detail {

// "[4, 128]" and "float32"
std::string shape_text(at::IntArrayRef sizes);
std::string dtype_text(at::ScalarType type);

// Python sees these as ValueError and TypeError.
void check_value(bool holds, const std::string& message);
void check_type(bool holds, const std::string& message);

// Of the arithmetic and the results: float64 for float64, else float32.
at::ScalarType result_type(const at::Tensor& input);
// A loss in that type.
at::Tensor result_scalar(double value, const at::Tensor& input);

// The float64 numbers of a block of metrics, copied to the host.
void copy_block(std::string_view function, const at::Tensor& block, double* out, size_t size);

// Runs `body`; an Error of the core comes out as ValueError or TypeError.
template <class Body>
auto with_public_errors(Body&& body) {
  try {
    return body();
  } catch (const TypeError& error) {
    check_type(false, error.what());
    throw;
  } catch (const Error& error) {
    check_value(false, error.what());
    throw;
  }
}

// A mask in a type that the loops take: integers as float32.
at::Tensor as_weights(const at::Tensor& mask);

// The batch with its offsets on the host, their ends and order checked.
template <template <class> class Inputs>
Inputs<at::Tensor> looked_at(std::string_view function, Inputs<at::Tensor> batch) {
  if constexpr (face::kHasOffsets<Inputs<at::Tensor>>) {
    const auto first = Inputs<at::Tensor>::arguments()[0];
    if (batch.offsets.defined()) batch.offsets = batch.offsets.cpu();
    face::layout_of(function, first.name, batch.*first.member, batch.offsets);
  }
  return batch;
}

enum class Offsets { looked_at, as_they_are };

// The batch with everything checked that its list asks for, before anything is computed, and in the
// types and shapes that the loops take: masks of integers as float32, counts as float64, one number
// a row as [B, 1], offsets on the host unless they stay as they are.
template <template <class> class Inputs>
Inputs<at::Tensor> checked(std::string_view function, const Inputs<at::Tensor>& batch,
                           Offsets offsets = Offsets::looked_at) {
  using Batch = Inputs<at::Tensor>;
  face::check_arguments(function, batch);
  Batch out = batch;
  const auto list = Batch::arguments();
  const at::Tensor& first = batch.*list[0].member;
  for (const auto& each : list) {
    at::Tensor& tensor = out.*each.member;
    if (!tensor.defined()) continue;
    if (each.kind == Kind::mask) tensor = as_weights(tensor);
    if (each.kind == Kind::counts) tensor = tensor.to(at::kDouble);
    const bool column = each.shape == Shape::either && !face::same_shape(tensor, first);
    if (column) tensor = tensor.reshape({tensor.size(0), 1});
  }
  if constexpr (face::kHasOffsets<Batch>) {
    if (out.offsets.defined()) out.offsets = out.offsets.contiguous();
  }
  return offsets == Offsets::looked_at ? looked_at(function, out) : out;
}

// A checked batch with its constants on the host.
template <template <class> class Inputs>
Inputs<at::Tensor> on_host(const Inputs<at::Tensor>& batch) {
  Inputs<at::Tensor> out = batch;
  for (const auto& each : Inputs<at::Tensor>::arguments()) {
    at::Tensor& tensor = out.*each.member;
    if (tensor.defined()) tensor = tensor.detach().cpu();
  }
  return out;
}

}  // namespace detail
}  // namespace tether
