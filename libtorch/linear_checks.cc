#include "libtorch/linear_checks.h"

#include <ATen/autocast_mode.h>
#include <c10/core/ScalarType.h>

#include "libtorch/arrays.h"
#include "libtorch/logits_rows.h"

namespace tether::detail {
namespace {

void check_like_hidden(const std::string& function, const std::string& name,
                       const at::Tensor& tensor, const at::Tensor& hidden) {
  check_type(tensor.scalar_type() == hidden.scalar_type(),
             function + ": " + name + " must be " + dtype_text(hidden.scalar_type()) +
                 " like hidden, got " + dtype_text(tensor.scalar_type()));
  check_device(function, name, tensor, "hidden", hidden);
}

void check_head(const std::string& function, const at::Tensor& hidden, const LinearHead& head) {
  const auto must = [&](bool holds, const std::string& rest) {
    check_value(holds, function + ": " + rest);
  };
  must(head.weight.defined(), "weight must be a tensor, got none");
  check_like_hidden(function, "weight", head.weight, hidden);
  must(head.weight.dim() == 2 && head.weight.size(0) >= 1 && head.weight.size(1) == hidden.size(-1),
       "weight must be [V, " + text(hidden.size(-1)) + "] with V at least 1, for hidden " +
           shape_text(hidden.sizes()) + ", got " + shape_text(head.weight.sizes()));
  if (!head.bias.defined()) return;
  check_like_hidden(function, "bias", head.bias, hidden);
  must(head.bias.dim() == 1 && head.bias.size(0) == head.weight.size(0),
       "bias must be [" + text(head.weight.size(0)) + "] like the rows of weight, got " +
           shape_text(head.bias.sizes()));
}

}  // namespace

LinearOperands in_one_type(const at::Tensor& hidden, const LinearHead& head) {
  const auto floating = [](const at::Tensor& tensor) {
    return tensor.defined() && at::isFloatingType(tensor.scalar_type());
  };
  if (!floating(hidden) || !floating(head.weight)) return {hidden, head};
  at::ScalarType type = c10::promoteTypes(hidden.scalar_type(), head.weight.scalar_type());
  if (floating(head.bias)) type = c10::promoteTypes(type, head.bias.scalar_type());
  const at::DeviceType device = hidden.device().type();
  if (at::autocast::is_autocast_enabled(device) && type != at::kDouble) {
    type = at::autocast::get_autocast_dtype(device);
  }
  return {hidden.to(type),
          {head.weight.to(type), floating(head.bias) ? head.bias.to(type) : head.bias}};
}

LinearInputs checked_linear(const std::string& function, const at::Tensor& hidden,
                            const LinearHead& head, const at::Tensor& targets,
                            const LinearOptions& options) {
  check_value(hidden.defined(), function + ": hidden must be a tensor, got none");
  check_floating(function, "hidden", hidden);
  check_value(
      hidden.dim() >= 1 && hidden.size(-1) >= 1,
      function + ": hidden must be [..., H] with H at least 1, got " + shape_text(hidden.sizes()));
  check_head(function, hidden, head);
  check_targets(function, targets, "hidden", hidden);
  check_value(options.chunk_bytes >= 1,
              function + ": chunk_bytes must be at least 1, got " + text(options.chunk_bytes));
  check_value(options.rows_per_chunk >= 0, function + ": rows_per_chunk must be at least 0, got " +
                                               text(options.rows_per_chunk));
  with_public_errors([&] { check_fields(function, row_options(options)); });
  const at::Tensor ids = targets.to(at::kLong).contiguous();
  check_ids(function, ids.cpu(), head.weight.size(0), options.ignore_index);
  return {.hidden = hidden.detach().reshape({ids.numel(), hidden.size(-1)}),
          .weight = head.weight.detach(),
          .bias = head.bias.defined() ? head.bias.detach() : at::Tensor(),
          .targets = ids.view({-1})};
}

RowOptions row_options(const LinearOptions& options) {
  return {.temperature = options.temperature,
          .scale = options.scale,
          .softcap = options.softcap,
          .ignore_index = options.ignore_index,
          .sums = options.statistics  ? RowSums::all
                  : options.entropies ? RowSums::entropy
                                      : RowSums::logp};
}

TokenLogpsOptions token_options(const LinearOptions& options) {
  return {.temperature = options.temperature,
          .scale = options.scale,
          .softcap = options.softcap,
          .entropies = options.entropies,
          .statistics = options.statistics,
          .ignore_index = options.ignore_index};
}

}  // namespace tether::detail
