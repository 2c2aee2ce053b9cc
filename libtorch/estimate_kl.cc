#include "libtorch/estimate_kl.h"

#include "libtorch/arrays.h"
#include "libtorch/token_checks.h"

namespace tether {

KlReport estimate_kl(const at::Tensor& log_ratios, const at::Tensor& response_mask,
                     const KlEstimateOptions& options, const at::Tensor& offsets) {
  const std::string_view function = "estimate_kl";
  detail::check_rows(function, "log_ratios", log_ratios, offsets);
  detail::check_rows_mask(function, response_mask, "log_ratios", log_ratios);
  const at::Tensor ends = detail::checked_offsets(function, offsets, log_ratios, "log_ratios");
  const at::Tensor in = log_ratios.detach().cpu(), mask = detail::as_weights(response_mask).cpu();
  return detail::with_value_errors([&] {
    return estimate_kl(detail::layout_of(in, ends), detail::token_array(in),
                       detail::token_array(mask), options);
  });
}

}  // namespace tether
