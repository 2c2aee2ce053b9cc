#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "../batch_weight.h"

namespace tether {

// How a token's log-probability goes with its advantage: the tokens where both are high take the
// entropy of the policy.
//
//   C_t = (A_t - mean A) (logp_t - mean logp),   means over the tokens of the batch
//
// Cui et al. 2025, arXiv:2505.22617, eq. 10.
inline std::vector<double> covariances(const BatchTokens& tokens) {
  const double A = mean_of(tokens, tokens.advantage), logp = mean_of(tokens, tokens.logp);
  std::vector<double> out(tokens.size());
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = (tokens.advantage[i] - A) * (tokens.logp[i] - logp);
  }
  return out;
}

// A share of the batch in tokens: at least one, and as many as there are.
inline size_t share_of(const BatchTokens& tokens, double share) {
  const double count = std::accumulate(tokens.weight.begin(), tokens.weight.end(), 0.0);
  const double wanted = std::max(1.0, std::floor(share * count));
  return static_cast<size_t>(std::min(wanted, static_cast<double>(tokens.size())));
}

// A whole random number below 2^53, of a seed and a place among the active tokens: so the picks are
// the same on every device. SplitMix64: Steele et al. 2014, doi:10.1145/2714064.2660195.
inline double lot(uint64_t place, uint64_t seed) {
  uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<double>((z ^ (z >> 31)) >> 11);
}

// Clip-Cov: 0 at randomly picked tokens of high covariance, low < C < high, else 1. Those that
// PPO's clip stops anyway are not picked. As token_weights of ppo.
//
// arXiv:2505.22617, section 4.2; defaults of verl. The picks of a seed are the same everywhere.
struct ClipCovPicks {
  double share = 2e-4;
  double low = 1;
  double high = 5;
  double epsilon_low = 0.2;
  double epsilon_high = 0.2;
  double seed = 0;

  static constexpr BatchNeeds needs{.logps = true, .old_logps = true, .advantages = true};
  static constexpr auto fields() {
    using Self = ClipCovPicks;
    constexpr Range kAny{-infinity, infinity, true};
    return std::tuple{field("share", &Self::share, {0, 1}),
                      field("low", &Self::low, kAny),
                      field("high", &Self::high, kAny),
                      field("epsilon_low", &Self::epsilon_low, {0, 1}),
                      field("epsilon_high", &Self::epsilon_high, {0, infinity}),
                      field("seed", &Self::seed, {0, 0x1p53})};
  }

  bool is_clipped(double ratio, double A) const {
    return A > 0 ? ratio > 1 + epsilon_high : A < 0 && ratio < 1 - epsilon_low;
  }
  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    const std::vector<double> C = covariances(tokens);
    std::vector<double> lots(C.size(), -1);  // of candidates
    for (size_t i = 0; i < C.size(); ++i) {
      const double ratio = std::exp(tokens.logp[i] - tokens.old_logp[i]);
      if (low < C[i] && C[i] < high && !is_clipped(ratio, tokens.advantage[i])) {
        lots[i] = lot(i, static_cast<uint64_t>(seed));
      }
    }
    const std::vector<size_t> order = descending(lots);
    const size_t picks = share_of(tokens, share);
    for (size_t k = 0; k < picks && lots[order[k]] >= 0; ++k) out[order[k]] = 0;
  }
};

// KL-Cov: 1 at the share of tokens with the highest covariance, else 0. As kl_weights of kl_cov
// (rl/policy/kl_cov.h).
//
// arXiv:2505.22617, section 4.2; defaults of verl. Of equal covariances the first counts.
struct KlCovPicks {
  double share = 2e-4;

  static constexpr BatchNeeds needs{.logps = true, .advantages = true};
  static constexpr auto fields() { return std::tuple{field("share", &KlCovPicks::share, {0, 1})}; }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    const std::vector<size_t> order = descending(covariances(tokens));
    std::fill(out.begin(), out.end(), 0.0);
    const size_t picks = share_of(tokens, share);
    for (size_t k = 0; k < picks; ++k) out[order[k]] = 1;
  }
};

}  // namespace tether
