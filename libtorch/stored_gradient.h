#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstring>
#include <optional>
#include <string>
#include <type_traits>

#include "../core/batch.h"

// What waits for backward: gradients that are found with the loss, tensors and options.

namespace tether::detail {

// What the gradient of `input` waits in: a loss scale comes too late for what float16 has already
// flushed to 0.
at::ScalarType stored_type(const at::Tensor& input);

// Memory for it beside the input and its view; undefined, and none, unless it is wanted.
at::Tensor gradient_memory(bool wanted, const at::Tensor& input, MutableArray& view);

// stored * upstream, in the type of the input; undefined if nothing is stored. What is exactly 0
// stays so whatever arrives. A second derivative through it raises in the name of `function`:
// without that torch would take the stored gradient for a constant and return zero.
at::Tensor scaled(const char* function, const at::Tensor& upstream, const at::Tensor& stored,
                  const at::Tensor& input);

// The tensor, for torch's own operations, whose gradient has none: slopes that are constants have
// no second derivative. It raises in the same words.
at::Tensor once_differentiable(const char* function, const at::Tensor& tensor);

// Raises in the name of `function`: the backward of a gradient that has none of its own, which
// torch would otherwise take for a constant.
[[noreturn]] void refuse_second_backward(const char* function);

// The bytes of options, for saved_data.
template <class Options>
c10::IValue packed(const Options& options) {
  static_assert(std::is_trivially_copyable_v<Options>);
  return std::string(reinterpret_cast<const char*>(&options), sizeof(options));
}
template <class Options>
Options unpacked(const c10::IValue& packed) {
  Options out;
  std::memcpy(&out, packed.toStringRef().data(), sizeof(out));
  return out;
}

// A tensor to be saved for backward: of inference mode none can be.
at::Tensor savable(const at::Tensor& tensor);

// A tensor as an input of the graph: nothing if absent, a constant where no graph is made.
std::optional<at::Tensor> input_of_graph(const at::Tensor& tensor);

}  // namespace tether::detail
