#pragma once

#include <array>
#include <map>
#include <string>

namespace tether {

// Sums over active tokens; add those of micro-batches and ranks.
struct ValueMetrics {
  enum Sum { kTokens, kLoss, kClipped, kReturn, kReturnSquared, kError, kErrorSquared, kSums };
  std::array<double, kSums> sums{};

  void merge(const ValueMetrics& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }
  // value_loss, value_clip_fraction, and explained_variance = 1 - Var(R - V) / Var R (0 where the
  // returns vary by no more than the rounding of their squares). 0 without tokens.
  std::map<std::string, double> to_map() const {
    const double n = sums[kTokens];
    const auto mean = [&](Sum sum) { return n > 0 ? sums[sum] / n : 0; };
    const double variance = mean(kReturnSquared) - mean(kReturn) * mean(kReturn);
    const bool varies = !(variance <= 1e-13 * mean(kReturnSquared));  // NaN comes out
    const double unexplained = mean(kErrorSquared) - mean(kError) * mean(kError);
    return {{"value_loss", mean(kLoss)},
            {"value_clip_fraction", mean(kClipped)},
            {"explained_variance", varies ? 1 - unexplained / variance : 0},
            {"tokens", n}};
  }
};

}  // namespace tether
