#include "libtorch/linear_checks.h"

#include <ATen/autocast_mode.h>
#include <c10/core/ScalarType.h>

#include "libtorch/arrays.h"
#include "libtorch/logits_rows.h"

namespace tether::detail {

namespace {

constexpr int64_t kMostRows = 0x7FFFFFFF;  // of a matrix product

LinearInputs in_one_type(const LinearInputs& given) {
  const auto& [hidden, weight, bias, targets, support] = given;
  at::ScalarType type = c10::promoteTypes(hidden.scalar_type(), weight.scalar_type());
  if (bias.defined()) type = c10::promoteTypes(type, bias.scalar_type());
  const at::DeviceType device = hidden.device().type();
  const bool may_be_cast = at::autocast::is_autocast_available(device) && type != at::kDouble;
  if (may_be_cast && at::autocast::is_autocast_enabled(device)) {
    type = at::autocast::get_autocast_dtype(device);
  }
  return {hidden.to(type), weight.to(type), bias.defined() ? bias.to(type) : bias,
          targets.to(at::kLong).contiguous(), support};
}

}  // namespace

LinearInputs checked_linear(std::string_view function, const at::Tensor& hidden,
                            const LinearHead& head, const at::Tensor& targets,
                            const LinearOptions& options) {
  const LinearInputs given{hidden, head.weight, head.bias, targets};
  face::check_arguments(function, given);
  require(options.chunk_bytes.value_or(1) >= 1, [&] {
    return named(function, "chunk_bytes") + " must be at least 1, got " +
           text(*options.chunk_bytes);
  });
  require(options.rows_per_chunk >= 0 && options.rows_per_chunk <= kMostRows, [&] {
    return named(function, "rows_per_chunk") + " must be in [0, " + text(kMostRows) + "], got " +
           text(options.rows_per_chunk);
  });
  check_fields(function, options.row);
  return in_one_type(given);
}

void check_targets(std::string_view function, const LinearInputs& inputs,
                   const LinearOptions& options) {
  if (row_kernels(inputs.hidden) != nullptr) return;
  check_ids(function, "targets", inputs.targets, inputs.weight.size(0), options.row.ignore_index);
}

LinearInputs as_rows(const LinearInputs& inputs) {
  const auto& [hidden, weight, bias, targets, support] = inputs;
  return {hidden.detach().reshape({targets.numel(), hidden.size(-1)}), weight.detach(),
          bias.defined() ? bias.detach() : bias, targets.view({-1}),
          support.defined() ? support.view({targets.numel(), -1}) : support};
}

}  // namespace tether::detail
