#include "libtorch/kl_report.h"

#include "libtorch/arrays.h"
#include "libtorch/token_checks.h"

namespace tether {

KlReport kl_report(const at::Tensor& log_ratios, const at::Tensor& response_mask,
                   const KlReportOptions& options, const at::Tensor& offsets) {
  const std::string_view function = "kl_report";
  detail::check_rows(function, "log_ratios", log_ratios, offsets);
  detail::check_rows_mask(function, response_mask, "log_ratios", log_ratios);
  const at::Tensor ends = detail::checked_offsets(function, offsets, log_ratios, "log_ratios");
  const at::Tensor in = log_ratios.detach().cpu(), mask = detail::as_weights(response_mask).cpu();
  return detail::with_value_errors([&] {
    return kl_report(detail::layout_of(in, ends), detail::token_array(in),
                     detail::token_array(mask), options);
  });
}

}  // namespace tether
