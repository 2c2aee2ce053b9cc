#pragma once

#include <array>
#include <string_view>
#include <tuple>

#include "../../core/arguments.h"
#include "../../core/batch.h"
#include "../../core/options.h"

namespace tether {

// KL(sampled || other) from the log-ratios of a batch of sampled sequences, and how far to trust
// it.

// Of a KL (forms.h): k_lambda needs the batch, and forms that estimate none have no place here.
enum class KlEstimator { k1, k2, k3, k_lambda };
inline constexpr std::array<std::string_view, 4> kKlEstimatorNames{"k1", "k2", "k3", "k_lambda"};

struct KlReportOptions {
  KlEstimator estimator = KlEstimator::k3;
  double lambda = -1;  // of k_lambda; below 0: fitted on the batch, with a bias of order 1 / tokens

  static constexpr auto fields() {
    return std::tuple{field("lambda", &KlReportOptions::lambda, {-1, largest_option})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("estimator", &KlReportOptions::estimator, kKlEstimatorNames)};
  }
};

// Rows [B, T], or packed [N].
template <class Array>
struct KlReportInputs {
  LayoutOf<Array> layout = {};
  Array log_ratios = {};  // d = log other - log sampled
  Array response_mask = {};
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = KlReportInputs;
    using A = Argument<In, Array>;
    return std::array{A{"log_ratios", &In::log_ratios, Shape::rows},
                      A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask}};
  }
};
using KlReportArrays = KlReportInputs<ConstArray>;

struct KlReport {
  double mean = 0;            // per token [nats]
  double standard_error = 0;  // of the mean, over sequences: tokens of a sequence are not
                              // independent. NaN for fewer than two
  double lambda = 0;          // that k_lambda took
  double ratio_excess = 0;  // mean r - 1, r = e^d: 0 in expectation; far from it, tails are unseen
  double ess = 0;           // (sum w r)^2 / sum w r^2: tokens that carry the ratios
  double tokens = 0, sequences = 0;
};

// Ratios saturate (core/number.h). A log-ratio that is NaN or infinite makes all but the counts and
// a lambda that was given NaN: -inf too, where the ratio of 0 would have hidden it. The mean is sum
// w k / sum w, its standard error that of a ratio of two sums over sequences: sqrt(n / (n - 1)
// sum_i (S_i - mean n_i)^2) / sum w.
KlReport kl_report(const KlReportArrays& batch, const KlReportOptions& options = {});

}  // namespace tether
