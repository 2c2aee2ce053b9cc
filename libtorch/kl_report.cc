#include "libtorch/kl_report.h"

#include "libtorch/arrays.h"

namespace tether {

KlReport kl_report(const at::Tensor& log_ratios, const at::Tensor& response_mask,
                   const KlReportOptions& options, const at::Tensor& offsets) {
  const auto function = "kl_report";
  return detail::with_public_errors([&] {
    const KlReportInputs<at::Tensor> given{
        .log_ratios = log_ratios, .response_mask = response_mask, .offsets = offsets};
    return kl_report(face::arrays_of(function, detail::on_host(detail::checked(function, given))),
                     options);
  });
}

MismatchReport mismatch_report(const at::Tensor& old_logps, const at::Tensor& rollout_logps,
                               const at::Tensor& response_mask, const at::Tensor& offsets) {
  const auto function = "mismatch_report";
  return detail::with_public_errors([&] {
    const MismatchInputs<at::Tensor> given{.old_logps = old_logps,
                                           .rollout_logps = rollout_logps,
                                           .response_mask = response_mask,
                                           .offsets = offsets};
    return mismatch_report(
        face::arrays_of(function, detail::on_host(detail::checked(function, given))));
  });
}

}  // namespace tether
