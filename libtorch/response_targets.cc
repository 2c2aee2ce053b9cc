#include "libtorch/response_targets.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include <string>

#include "libtorch/arrays.h"

namespace tether {
namespace {

constexpr const char* kName = "response_targets";

void check_integer(const char* argument, const at::Tensor& tensor) {
  detail::check_type(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt,
                     std::string(kName) + ": " + argument + " must be int32 or int64, got " +
                         detail::dtype_text(tensor.scalar_type()));
}

void check_shape(const char* argument, const at::Tensor& tensor, at::IntArrayRef expected,
                 const at::Tensor& input_ids) {
  detail::check_value(tensor.sizes() == expected,
                      std::string(kName) + ": " + argument + " must be " +
                          detail::shape_text(expected) + " like input_ids " +
                          detail::shape_text(input_ids.sizes()) + ", got " +
                          detail::shape_text(tensor.sizes()));
}

void check_lengths(const at::Tensor& prompt_lengths, int64_t length) {
  const at::Tensor on_cpu = prompt_lengths.to(at::kLong).cpu().contiguous();
  const int64_t* lengths = on_cpu.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < on_cpu.numel(); ++row) {
    detail::check_value(1 <= lengths[row] && lengths[row] <= length,
                        std::string(kName) + ": prompt_lengths must be in [1, " + text(length) +
                            "], got " + text(lengths[row]) + " at [" + text(row) + "]");
  }
}

void check_tensors(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                   const at::Tensor& attention_mask) {
  using namespace detail;
  const std::string name = kName;
  check_value(input_ids.defined(), name + ": input_ids must be a tensor, got none");
  check_value(prompt_lengths.defined(), name + ": prompt_lengths must be a tensor, got none");
  check_integer("input_ids", input_ids);
  check_integer("prompt_lengths", prompt_lengths);
  check_value(
      input_ids.dim() == 2 && input_ids.size(1) >= 1,
      name + ": input_ids must be [B, L] with L at least 1, got " + shape_text(input_ids.sizes()));
  check_device(name, "prompt_lengths", prompt_lengths, "input_ids", input_ids);
  check_shape("prompt_lengths", prompt_lengths, {input_ids.size(0)}, input_ids);
  if (attention_mask.defined()) {
    check_type(at::isIntegralType(attention_mask.scalar_type(), /*includeBool=*/true),
               name + ": attention_mask must be bool or integer, got " +
                   dtype_text(attention_mask.scalar_type()));
    check_device(name, "attention_mask", attention_mask, "input_ids", input_ids);
    check_shape("attention_mask", attention_mask, input_ids.sizes(), input_ids);
  }
  check_lengths(prompt_lengths, input_ids.size(1));
}

}  // namespace

ResponseTargets response_targets(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                                 const at::Tensor& attention_mask) {
  check_tensors(input_ids, prompt_lengths, attention_mask);
  const int64_t length = input_ids.size(1);
  const at::Tensor position = at::arange(length, input_ids.options().dtype(at::kLong));
  at::Tensor response_start = prompt_lengths.to(at::kLong).unsqueeze(1);
  at::Tensor in_response = position >= response_start;
  if (attention_mask.defined()) {
    const at::Tensor attended = attention_mask != 0;
    const at::Tensor first_attended = attended.to(at::kInt).argmax(1, /*keepdim=*/true);
    in_response = (position >= first_attended + response_start).logical_and(attended);
  }
  return {.targets = input_ids.slice(1, 1).to(at::kLong).contiguous(),
          .response_mask = in_response.slice(1, 1).contiguous()};
}

}  // namespace tether
