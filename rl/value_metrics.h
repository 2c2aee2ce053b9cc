#pragma once

#include <array>
#include <map>
#include <string>

namespace tether {

// Sums over active tokens. Those of micro-batches and ranks may be added up; merge() loses nothing.
// A return or an error that is NaN or infinite makes its sums NaN.
// A variance is not E[x^2] - E[x]^2, which cancels, but of the deviations from the mean of a batch:
// kReturnSpread = sum w (R - mean)^2. Where sums were added up, the squares say in addition what
// the means of the batches vary by, as far as their rounding lets it be seen.
struct ValueMetrics {
  enum Sum {
    kTokens,
    kLoss,
    kClipped,
    kReturn,
    kReturnSquared,
    kError,
    kErrorSquared,
    kReturnSpread,
    kErrorSpread,
    kSums
  };
  std::array<double, kSums> sums{};

  // Chan, Golub, LeVeque 1979.
  void merge(const ValueMetrics& other) {
    const double n = sums[kTokens], m = other.sums[kTokens];
    const auto between = [&](Sum sum) {
      const double gap = other.sums[sum] / m - sums[sum] / n;
      return n > 0 && m > 0 ? gap * gap * n * (m / (n + m)) : 0;
    };
    const double of_returns = between(kReturn), of_errors = between(kError);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
    sums[kReturnSpread] += of_returns;
    sums[kErrorSpread] += of_errors;
  }
  // value_loss, value_clip_fraction, and explained_variance = 1 - Var(R - V) / Var R (0 where the
  // returns vary by no more than the rounding of their mean). 0 without tokens.
  std::map<std::string, double> to_map() const {
    const double n = sums[kTokens];
    const auto mean = [&](Sum sum) { return n > 0 ? sums[sum] / n : 0; };
    const auto variance = [&](Sum sum, Sum squared, Sum spread) {
      const double within = mean(spread);
      const double between = mean(squared) - mean(sum) * mean(sum) - within;
      const bool seen = !(between <= 1e-13 * mean(squared));  // NaN comes out
      return within + (seen ? between : 0);
    };
    const double of_returns = variance(kReturn, kReturnSquared, kReturnSpread);
    const double of_errors = variance(kError, kErrorSquared, kErrorSpread);
    const bool varies = !(of_returns <= 1e-26 * mean(kReturnSquared));
    return {{"value_loss", mean(kLoss)},
            {"value_clip_fraction", mean(kClipped)},
            {"explained_variance", varies ? 1 - of_errors / of_returns : 0},
            {"tokens", n}};
  }
};

}  // namespace tether
