#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "../batch_weight.h"

namespace tether {

// Truncated importance weights of the mismatch between trainer and engine, divided by their mean
// over the tokens of the batch: the step keeps its length, whatever the mismatch.
//
//   W_t = rho_t / mean rho,   rho = clamp(e^x, low, high),   x = old_logp - rollout_logp
//
// The self-normalised estimator: biased, by 1 / tokens, of less variance. verl,
// rollout_is_batch_normalize.
struct NormalizedImportance {
  double low = 0;
  double high = 2;

  static constexpr BatchNeeds needs{.old_logps = true, .rollout_logps = true};
  static constexpr auto fields() {
    using Self = NormalizedImportance;
    return std::tuple{field("low", &Self::low, {0, largest_option}),
                      field("high", &Self::high, {0, infinity, true})};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    for (size_t i = 0; i < out.size(); ++i) {
      const double ratio = exp_within(tokens.old_logp[i] - tokens.rollout_logp[i]);
      out[i] = std::min(std::max(ratio, low), high);
    }
    const double mean = mean_of(tokens, out);
    for (double& each : out) each /= mean;
  }
};

}  // namespace tether
