#include "libtorch/policy_inputs.h"

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/policy_loss.h"
#include "libtorch/token_checks.h"
#include "rl/kernels/policy_loss.h"

namespace tether {
namespace detail {
namespace {

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

}  // namespace

PolicyBatch checked(std::string_view function, const PolicyBatch& batch) {
  check_given(function, "logps", batch.logps);
  check_floating(function, "logps", batch.logps);
  check_shape_of_logps(function, batch.logps, batch.offsets);
  PolicyBatch out = batch;
  out.offsets = checked_offsets(function, batch.offsets, batch.logps);
  const int64_t rows = out.offsets.defined() ? out.offsets.size(0) - 1 : batch.logps.size(0);
  out.advantages = checked_advantages(function, batch, rows);
  out.response_mask = checked_mask(function, batch.response_mask, batch.logps);
  check_constant_tokens(function, "old_logps", batch.old_logps, batch.logps);
  check_constant_tokens(function, "ref_logps", batch.ref_logps, batch.logps);
  check_optional_tokens(function, "entropies", batch.entropies, batch.logps);
  return out;
}

PolicyViews::PolicyViews(const PolicyBatch& batch) {
  arrays_.layout = layout_of(batch.logps, batch.offsets);
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
