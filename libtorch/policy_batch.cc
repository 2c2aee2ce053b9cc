#include "libtorch/policy_batch.h"

#include "libtorch/arrays.h"
#include "libtorch/executor.h"

namespace tether {
namespace detail {
namespace {

std::string named(std::string_view function, std::string_view name) {
  return std::string(function) + ": " + std::string(name);
}

void check_given(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  if (!tensor.defined()) check_value(false, named(function, name) + " must be given, got none");
}

void check_shape_of_logps(std::string_view function, const PolicyBatch& batch) {
  const int64_t dimensions = batch.offsets.defined() ? 1 : 2;
  if (batch.logps.dim() == dimensions) return;
  check_value(false, named(function, "logps") +
                         (dimensions == 1 ? " must be [N] with offsets"
                                          : " must be [B, T], or [N] with offsets") +
                         ", got " + shape_text(batch.logps.sizes()));
}

// Arithmetic is in float32, or in float64 with logps; nothing is rounded to enter it.
void check_width(std::string_view function, std::string_view name, const at::Tensor& tensor,
                 const at::Tensor& logps) {
  if (tensor.scalar_type() != at::kDouble || logps.scalar_type() == at::kDouble) return;
  check_type(false, named(function, name) + " must not be wider than logps, " +
                        dtype_text(logps.scalar_type()) + ", got float64. Pass " +
                        std::string(name) + ".to(torch.float32)");
}

void check_tokens(std::string_view function, std::string_view name, const at::Tensor& tensor,
                  const at::Tensor& logps) {
  check_device(function, name, tensor, "logps", logps);
  if (tensor.sizes() == logps.sizes()) return;
  check_value(false, named(function, name) + " must be " + shape_text(logps.sizes()) +
                         " like logps, got " + shape_text(tensor.sizes()));
}

void check_optional_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps) {
  if (!tensor.defined()) return;
  check_floating(function, name, tensor);
  check_width(function, name, tensor, logps);
  check_tokens(function, name, tensor, logps);
}

void check_constant_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps) {
  check_optional_tokens(function, name, tensor, logps);
  if (tensor.defined()) check_constant(function, name, tensor);
}

at::Tensor checked_advantages(std::string_view function, const PolicyBatch& batch, int64_t rows) {
  const at::Tensor& advantages = batch.advantages;
  const at::Tensor& logps = batch.logps;
  check_given(function, "advantages", advantages);
  check_floating(function, "advantages", advantages);
  check_width(function, "advantages", advantages, logps);
  check_device(function, "advantages", advantages, "logps", logps);
  check_constant(function, "advantages", advantages);
  if (advantages.sizes() == logps.sizes()) return advantages;
  const bool column = advantages.dim() == 2 && advantages.size(1) == 1;
  if ((column || advantages.dim() == 1) && advantages.size(0) == rows) {
    return advantages.reshape({rows, 1});
  }
  check_value(false, named(function, "advantages") + " must be [" + text(rows) + "] or " +
                         shape_text(logps.sizes()) + ", got " + shape_text(advantages.sizes()));
  return {};
}

at::Tensor checked_mask(std::string_view function, const PolicyBatch& batch) {
  const at::Tensor& mask = batch.response_mask;
  check_given(function, "response_mask", mask);
  check_tokens(function, "response_mask", mask, batch.logps);
  const at::ScalarType type = mask.scalar_type();
  if (at::isIntegralType(type, /*includeBool=*/false)) return mask.to(at::kFloat);
  if (type != at::kBool) check_floating(function, "response_mask", mask);
  check_constant(function, "response_mask", mask);
  return mask;
}

at::Tensor checked_offsets(std::string_view function, const PolicyBatch& batch) {
  if (!batch.offsets.defined()) return {};
  const at::ScalarType type = batch.offsets.scalar_type();
  if (type != at::kInt && type != at::kLong) {
    check_type(false,
               named(function, "offsets") + " must be int32 or int64, got " + dtype_text(type));
  }
  if (batch.offsets.dim() != 1 || batch.offsets.size(0) < 1) {
    check_value(false, named(function, "offsets") + " must be [B + 1], got " +
                           shape_text(batch.offsets.sizes()));
  }
  const at::Tensor offsets = batch.offsets.cpu().contiguous();
  const int64_t first = offsets[0].item<int64_t>(), last = offsets[-1].item<int64_t>();
  if (first != 0 || last != batch.logps.size(0)) {
    check_value(false, named(function, "offsets") + " must run from 0 to " +
                           text(batch.logps.size(0)) + ", the size of logps, got " + text(first) +
                           " to " + text(last));
  }
  return offsets;
}

}  // namespace

PolicyBatch checked(std::string_view function, const PolicyBatch& batch) {
  check_given(function, "logps", batch.logps);
  check_floating(function, "logps", batch.logps);
  check_shape_of_logps(function, batch);
  PolicyBatch out = batch;
  out.offsets = checked_offsets(function, batch);
  const int64_t rows = out.offsets.defined() ? out.offsets.size(0) - 1 : batch.logps.size(0);
  out.advantages = checked_advantages(function, batch, rows);
  out.response_mask = checked_mask(function, batch);
  check_constant_tokens(function, "old_logps", batch.old_logps, batch.logps);
  check_constant_tokens(function, "ref_logps", batch.ref_logps, batch.logps);
  check_optional_tokens(function, "entropies", batch.entropies, batch.logps);
  return out;
}

PolicyViews::PolicyViews(const PolicyBatch& batch) {
  RowLayout& layout = arrays_.layout;
  if (batch.offsets.defined()) {
    layout.rows = batch.offsets.size(0) - 1;
    if (batch.offsets.scalar_type() == at::kInt) {
      layout.offsets32 = batch.offsets.const_data_ptr<int32_t>();
    } else {
      layout.offsets64 = batch.offsets.const_data_ptr<int64_t>();
    }
  } else {
    layout.rows = batch.logps.size(0);
    layout.columns = batch.logps.size(1);
  }
  arrays_.logps = token_array(batch.logps);
  arrays_.response_mask = token_array(batch.response_mask);
  const bool per_token = batch.advantages.sizes() == batch.logps.sizes();
  arrays_.advantages = per_token ? token_array(batch.advantages) : row_array(batch.advantages);
  if (batch.old_logps.defined()) arrays_.old_logps = token_array(batch.old_logps);
  if (batch.ref_logps.defined()) arrays_.ref_logps = token_array(batch.ref_logps);
  if (batch.entropies.defined()) arrays_.entropies = token_array(batch.entropies);
}

}  // namespace detail

Normalizer local_counts(const PolicyBatch& batch, const PolicyObjective& objective) {
  PolicyBatch checked = detail::checked("local_counts", batch);
  return detail::with_value_errors([&] {
    if (!checked.logps.is_cpu()) {
      checked.logps = checked.logps.detach().cpu();
      checked.advantages = checked.advantages.cpu();
      checked.response_mask = checked.response_mask.cpu();
      checked.old_logps = at::Tensor();
      checked.ref_logps = at::Tensor();
      checked.entropies = at::Tensor();
    }
    return local_counts(detail::PolicyViews(checked).arrays(), objective, torch_executor());
  });
}

}  // namespace tether
