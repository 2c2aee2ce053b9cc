#pragma once

#include <array>
#include <map>
#include <string>
#include <string_view>

namespace tether {

// What a training loop logs about a preference loss: sums over examples beside their count, so that
// adding the blocks of micro-batches and ranks gives the exact figures of the step. Rewards are
// beta times the score before the link (arXiv:2305.18290, eq. 5), log-probabilities those of whole
// answers, whatever the score is. Answers with labels are chosen or rejected ones by their label;
// there is no accuracy of them.
struct PreferenceMetrics {
  enum Sum {
    kLoss,  // of the examples, with loss_weight and the weights of answers
    kRewardChosen,
    kRewardRejected,
    kMargin,    // reward of the chosen - of the rejected; of labelled answers, of their means
    kAccuracy,  // margin > 0; a tie counts 0
    kLogpChosen,
    kLogpRejected,
    kNll,        // by its mean, without nll_coef
    kNonfinite,  // examples with a NaN or infinity in a score or in the result
    kSums
  };
  std::array<double, 2 * kSums> sums{};

  static constexpr std::array<std::string_view, kSums> kNames{
      "preference_loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen",
      "logp_rejected",   "nll",           "nonfinite"};

  void merge(const PreferenceMetrics& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }

  // Means by name; `nonfinite` is the count itself. 0 without pairs.
  std::map<std::string, double> to_map() const {
    std::map<std::string, double> out;
    for (size_t i = 0; i < kSums; ++i) {
      const double count = i == kNonfinite ? 1 : sums[2 * i + 1];
      out[std::string(kNames[i])] = count > 0 ? sums[2 * i] / count : 0;
    }
    const double pairs = sums[2 * kMargin + 1];
    if (pairs == 0) out["margin"] = out["reward_chosen"] - out["reward_rejected"];
    out["pairs"] = sums[2 * kLoss + 1];
    return out;
  }
};

}  // namespace tether
