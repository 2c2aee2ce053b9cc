#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "face/device_arrays.h"
#include "python/cuda_arrays.h"
#include "python/functions.h"
#include "python/on_device.h"

// Functions of python/functions.h on CUDA. Lists, checks and schemas are those of the CPU: what a
// function needs is on_cuda(call), its results on the device, and its name in `implement`.

namespace tether::python {

template <class Function>
struct OnCuda : Function {
  template <class Array>
  using Inputs = typename Function::template Inputs<Array>;

  static Inputs<ConstArray> arrays_of(const Inputs<Tensor>& tensors) {
    return face::device_arrays(tensors);
  }
  static std::vector<Tensor> run(const Call<OnCuda>& call) { return on_cuda(call); }
};

template <class... Functions>
void implement(auto& library) {
  (library.impl(std::string(Functions::kName).c_str(), &Operator<OnCuda<Functions>>::boxed), ...);
}

// An operator that the CPU has not: the function with one more tensor, which is on the device.
template <class Function>
void define(auto& library, std::string_view name) {
  library.def(Operator<Function>::schema(name).c_str());
}
template <class Function>
void implement_as(auto& library, const char* name) {
  library.impl(name, &Operator<Function>::boxed);
}

// ---- results ------------------------------------------------------------------------------------

inline Tensor new_like_on(const Tensor& like) {
  return torch::stable::new_empty(like, sizes_of(like));
}

// As new_gradient, on the device of the input.
inline Tensor new_gradient_on(bool wanted, const Tensor& input, MutableArray& view) {
  if (!wanted) return torch::stable::new_empty(input, {0});
  const bool half = input.scalar_type() == ScalarType::Half;
  const Tensor out = torch::stable::new_empty(input, sizes_of(input),
                                              half ? ScalarType::Float : input.scalar_type());
  view = face::mutable_token_array(out);
  return out;
}

// The tensor that a list has under this name.
template <template <class> class Inputs>
const Tensor& tensor_of(const Inputs<Tensor>& tensors, std::string_view name) {
  const auto list = Inputs<Tensor>::arguments();
  const auto* found = &list[0];
  for (const auto& each : list) found = each.name == name ? &each : found;
  return tensors.*found->member;
}

// What a loss leaves on the device, its number and then its blocks, as the results of an operator,
// which share no memory.
class DeviceTotals {
 public:
  DeviceTotals(const Tensor& device, int64_t numbers) : numbers_(new_doubles_on(device, numbers)) {}

  void* data() const { return numbers_.mutable_data_ptr(); }
  Tensor loss() const {
    return torch::stable::to(torch::stable::select(numbers_, 0, 0), ScalarType::Float);
  }
  Tensor next_block(const Result& block) {
    std::vector<int64_t> sizes{block.sizes[0]};
    if (block.sizes[1] > 0) sizes.push_back(block.sizes[1]);
    const int64_t count = block.sizes[0] * std::max<int64_t>(block.sizes[1], 1), first = next_;
    next_ += count;
    return torch::stable::clone(
        torch::stable::view(torch::stable::narrow(numbers_, 0, first, count), sizes));
  }

 private:
  Tensor numbers_;
  int64_t next_ = 1;
};

}  // namespace tether::python
