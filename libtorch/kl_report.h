#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/kl/mismatch.h"
#include "../estimators/kl/report.h"

namespace tether {

// KL(sampled || other) per token and how far to trust it (estimators/kl/report.h), from
// log_ratios = log other - log sampled: [B, T], or packed [N] with offsets [B + 1]; response_mask
// like it. A constant, in float64; tensors elsewhere come over to the CPU, which waits for them,
// and the report is of the host's numbers.
KlReport kl_report(const at::Tensor& log_ratios, const at::Tensor& response_mask,
                   const KlReportOptions& options = {}, const at::Tensor& offsets = {});

// How far the trainer's policy is from the engine that sampled (estimators/kl/mismatch.h), from
// log-probabilities [B, T], or packed [N] with offsets [B + 1]. Likewise.
MismatchReport mismatch_report(const at::Tensor& old_logps, const at::Tensor& rollout_logps,
                               const at::Tensor& response_mask, const at::Tensor& offsets = {});

}  // namespace tether
