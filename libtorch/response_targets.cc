#include "libtorch/response_targets.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include <string>
#include <string_view>

#include "libtorch/arrays.h"

namespace tether {
namespace {

constexpr const char* kName = "response_targets";

struct Rule {
  std::string_view name;
  Shape shape;
  Kind kind = Kind::ids;
  Use use = Use::required;
  Flow flow = Flow::constant;
};

void check_mask(const at::Tensor& attention_mask, const face::Like<at::Tensor>& like) {
  const std::string where = named(kName, "attention_mask");
  require_type(at::isIntegralType(attention_mask.scalar_type(), /*includeBool=*/true), [&] {
    return where + " must be bool or integer, got " +
           detail::dtype_text(attention_mask.scalar_type());
  });
  face::check_device(where, attention_mask, like);
  face::check_shape(where, Shape::tokens, attention_mask, like);
}

void check_lengths(const at::Tensor& prompt_lengths, int64_t length) {
  const at::Tensor on_cpu = prompt_lengths.to(at::kLong).cpu().contiguous();
  const int64_t* lengths = on_cpu.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < on_cpu.numel(); ++row) {
    require(1 <= lengths[row] && lengths[row] <= length, [&] {
      return named(kName, "prompt_lengths") + " must be in [1, " + text(length) + "], got " +
             text(lengths[row]) + " at [" + text(row) + "]";
    });
  }
}

void check_tensors(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                   const at::Tensor& attention_mask) {
  const face::Like<at::Tensor> like{"input_ids", input_ids, Shape::tokens, false, 0};
  face::check_argument(kName, Rule{"input_ids", Shape::tokens}, input_ids, like);
  require(input_ids.dim() == 2 && input_ids.size(1) >= 1, [&] {
    return named(kName, "input_ids") + " must be [B, L] with L at least 1, got " +
           detail::shape_text(input_ids.sizes());
  });
  face::check_argument(kName, Rule{"prompt_lengths", Shape::positions}, prompt_lengths, like);
  if (attention_mask.defined()) check_mask(attention_mask, like);
  check_lengths(prompt_lengths, input_ids.size(1));
}

}  // namespace

ResponseTargets response_targets(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                                 const at::Tensor& attention_mask) {
  detail::with_public_errors([&] { check_tensors(input_ids, prompt_lengths, attention_mask); });
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
