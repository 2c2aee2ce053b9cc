#pragma once

#include "../../core/batch.h"
#include "forms.h"

namespace tether {

// KL(sampled || other) from the log-ratios of a batch of sampled sequences, and how far to trust
// it.

struct KlReportOptions {
  KlEstimator estimator = KlEstimator::k3;  // forms.h
  double lambda = -1;  // of k_lambda; below 0: fitted on the batch, with a bias of order 1 / tokens
};

struct KlReport {
  double mean = 0;            // per token [nats]
  double standard_error = 0;  // of the mean, over sequences: tokens of a sequence are not
                              // independent. NaN for fewer than two
  double lambda = 0;          // that k_lambda took
  double ratio_excess = 0;  // mean r - 1, r = e^d: 0 in expectation; far from it, tails are unseen
  double ess = 0;           // (sum w r)^2 / sum w r^2: tokens that carry the ratios
  double tokens = 0, sequences = 0;
};

// log_ratios: d = log other - log sampled, per token; weights in [0, 1] as in policy_loss. Ratios
// saturate (core/number.h). The mean is sum w k / sum w, its standard error that of a ratio of two
// sums over sequences: sqrt(n / (n - 1) sum_i (S_i - mean n_i)^2) / sum w.
KlReport kl_report(const RowLayout& layout, const ConstArray& log_ratios,
                   const ConstArray& response_mask, const KlReportOptions& options = {});

}  // namespace tether
