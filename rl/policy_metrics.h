#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <string_view>

#include "../core/macros.h"

namespace tether {

// A larger ratio counts as this in the metrics: sums of its square stay finite.
template <class T>
inline constexpr T kLargestRatio = T(1e150);
template <>
inline constexpr float kLargestRatio<float> = 1e17f;

// What a training loop logs about a policy loss. Every entry is a sum over active tokens, beside
// its count, so that adding the blocks of micro-batches and ranks (one all-reduce) gives the exact
// figures of the step; the maxima combine by max (another one). Ratios are those of the objective's
// level (rl/level.h): where a sequence or a turn has one, it counts once in what is said of it,
// by the mean of its tokens.
struct PolicyMetrics {
  enum Sum {
    kPolicyLoss,  // S
    kKl,          // K, the estimate of KL(policy || reference), where there is a penalty
    kEntropy,     // H, where the batch has entropies
    // Tokens without a gradient, or whose weight is truncated (CISPO):
    kClipFractionLow,   // ratio < 1 and A not 0, or truncated from below
    kClipFractionHigh,  // A > 0 and ratio > 1
    kClipFractionDual,  // A < 0 and ratio > 1
    kApproxKlK1,        // -log_ratio: k1 of KL(old policy || policy)
    kApproxKlK3,        // e^log_ratio - 1 - log_ratio: k3 of the same
    kRatio,             // exp(log_ratio), at most kLargestRatio
    kRatioSquared,
    kNonfinite,  // active tokens with a NaN or infinity in an input or in the result
    kWeight,     // W, the product of the weights (rl/token_weight.h), at most kLargestRatio
    kWeightSquared,
    kWeightZero,  // tokens that a weight takes out
    kSums
  };
  enum Maximum { kLogRatioMax, kNegLogRatioMax, kWeightMax, kMaxima };

  TETHER_INLINE static constexpr bool is_of_ratio(int sum) {
    return sum >= kClipFractionLow && sum <= kRatioSquared;
  }

  // [value, count] pairs, as one flat block for an all-reduce.
  static constexpr int kPairs = kSums;
  std::array<double, 2 * kPairs> sums{};
  std::array<double, kMaxima> maxima{-kUnseen, -kUnseen, -kUnseen};

  static constexpr double kUnseen = std::numeric_limits<double>::infinity();
  static constexpr std::array<std::string_view, kSums> kNames{"policy_loss",
                                                              "kl",
                                                              "entropy",
                                                              "clip_fraction_low",
                                                              "clip_fraction_high",
                                                              "clip_fraction_dual",
                                                              "approx_kl_k1",
                                                              "approx_kl_k3",
                                                              "ratio_mean",
                                                              "ratio_squared_mean",
                                                              "nonfinite",
                                                              "weight_mean",
                                                              "weight_squared_mean",
                                                              "weight_zero_fraction"};

  // Where there are no weights every token weighs 1.
  void set_unweighted(double tokens) {
    sums[2 * kWeight] = sums[2 * kWeightSquared] = tokens;
    if (tokens > 0) maxima[kWeightMax] = 1;
  }

  void merge(const PolicyMetrics& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
    for (size_t i = 0; i < maxima.size(); ++i) maxima[i] = std::fmax(maxima[i], other.maxima[i]);
  }

  // Means by name; `nonfinite` is the count itself, `ess` the effective share of tokens, sequences
  // or turns, (sum w)^2 / (n sum w^2) of the importance weights w = ratio, `weight_ess` that of
  // w = W over tokens; where the squares underflow, what it is at least: sum w / (n max w). 0
  // without tokens; without weights W is 1.
  std::map<std::string, double> to_map() const {
    std::map<std::string, double> out;
    const auto mean = [&](int i) {
      const double count = sums[2 * static_cast<size_t>(i) + 1];
      return count > 0 ? sums[2 * static_cast<size_t>(i)] / count : 0;
    };
    for (int i = 0; i < kSums; ++i) out[std::string(kNames[static_cast<size_t>(i)])] = mean(i);
    out["nonfinite"] = sums[2 * kNonfinite];
    out["tokens"] = sums[2 * kPolicyLoss + 1];
    const bool any = sums[2 * kPolicyLoss + 1] > 0;
    out["ratio_max"] = any ? std::exp(maxima[kLogRatioMax]) : 0;
    out["ratio_min"] = any ? std::exp(-maxima[kNegLogRatioMax]) : 0;
    out["weight_max"] = any ? maxima[kWeightMax] : 0;
    const auto effective_share = [&](int weight, int square, double largest) {
      const double w = mean(weight), squared = mean(square);
      if (squared > 0) return std::min(w / squared * w, 1.0);
      return w > 0 ? std::min(w / largest, 1.0) : 0;
    };
    out["ess"] = effective_share(kRatio, kRatioSquared, out["ratio_max"]);
    out["weight_ess"] = effective_share(kWeight, kWeightSquared, out["weight_max"]);
    return out;
  }
};

}  // namespace tether
