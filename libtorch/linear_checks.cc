#include "libtorch/linear_checks.h"

#include <ATen/autocast_mode.h>
#include <c10/core/ScalarType.h>

#include "libtorch/arrays.h"
#include "libtorch/logits_rows.h"

namespace tether::detail {

namespace {

LinearInputs in_one_type(const LinearInputs& given) {
  const auto& [hidden, weight, bias, targets, support] = given;
  at::ScalarType type = c10::promoteTypes(hidden.scalar_type(), weight.scalar_type());
  if (bias.defined()) type = c10::promoteTypes(type, bias.scalar_type());
  const at::DeviceType device = hidden.device().type();
  if (at::autocast::is_autocast_enabled(device) && type != at::kDouble) {
    type = at::autocast::get_autocast_dtype(device);
  }
  return {hidden.to(type), weight.to(type), bias.defined() ? bias.to(type) : bias,
          targets.to(at::kLong).contiguous(), support};
}

}  // namespace

LinearInputs checked_linear(std::string_view function, const at::Tensor& hidden,
                            const LinearHead& head, const at::Tensor& targets,
                            const LinearOptions& options) {
  const auto at_least = [&](std::string_view name, int64_t least, int64_t value) {
    require(value >= least, [&] {
      return named(function, name) + " must be at least " + text(least) + ", got " + text(value);
    });
  };
  const LinearInputs given{hidden, head.weight, head.bias, targets};
  face::check_arguments(function, given);
  at_least("chunk_bytes", 1, options.chunk_bytes);
  at_least("rows_per_chunk", 0, options.rows_per_chunk);
  check_fields(function, options.row);
  return in_one_type(given);
}

void check_targets(std::string_view function, const LinearInputs& inputs,
                   const LinearOptions& options) {
  check_ids(function, "targets", inputs.targets, inputs.weight.size(0), options.row.ignore_index);
}

LinearInputs as_rows(const LinearInputs& inputs) {
  const auto& [hidden, weight, bias, targets, support] = inputs;
  return {hidden.detach().reshape({targets.numel(), hidden.size(-1)}), weight.detach(),
          bias.defined() ? bias.detach() : bias, targets.view({-1}),
          support.defined() ? support.view({targets.numel(), -1}) : support};
}

}  // namespace tether::detail
