#pragma once

#include <array>
#include <map>
#include <string>
#include <string_view>

namespace tether {

// What a training loop logs about a preference loss: sums over pairs beside their count, so that
// adding the blocks of micro-batches and ranks gives the exact figures of the step. Rewards are
// beta times the score before the link (arXiv:2305.18290, eq. 5), log-probabilities those of whole
// answers, whatever the score is.
struct PreferenceMetrics {
  enum Sum {
    kLoss,
    kRewardChosen,
    kRewardRejected,
    kMargin,    // reward of the chosen - of the rejected
    kAccuracy,  // margin > 0; a tie counts 0
    kLogpChosen,
    kLogpRejected,
    kNonfinite,  // pairs with a NaN or infinity in a score or in the result
    kSums
  };
  std::array<double, 2 * kSums> sums{};

  static constexpr std::array<std::string_view, kSums> kNames{
      "preference_loss", "reward_chosen", "reward_rejected", "margin",
      "accuracy",        "logp_chosen",   "logp_rejected",   "nonfinite"};

  void merge(const PreferenceMetrics& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }

  // Means over pairs by name; `nonfinite` is the count itself. 0 without pairs.
  std::map<std::string, double> to_map() const {
    std::map<std::string, double> out;
    for (size_t i = 0; i < kSums; ++i) {
      const double count = i == kNonfinite ? 1 : sums[2 * i + 1];
      out[std::string(kNames[i])] = count > 0 ? sums[2 * i] / count : 0;
    }
    out["pairs"] = sums[2 * kLoss + 1];
    return out;
  }
};

}  // namespace tether
