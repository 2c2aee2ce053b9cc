#pragma once

#include <span>
#include <vector>

#include "../batch_weight.h"

namespace tether {

// M2PO: 0 at the tokens of largest x^2, x = old_logp - rollout_logp, as many as it takes until the
// mean of the others is below `threshold`; else 1. One token stays. Times the mask: it leaves.
//
// Zheng et al. 2025, arXiv:2510.01161, eq. 4 and algorithm 1, of all tokens as in AReaL: the paper
// looks at those alone that PPO would clip. Of equal x^2 the first goes first.
struct SecondMoment {
  double threshold = 0.04;

  static constexpr BatchNeeds needs{.old_logps = true, .rollout_logps = true};
  static constexpr auto fields() {
    return std::tuple{field("threshold", &SecondMoment::threshold, {0, infinity, true})};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    std::vector<double> squares(tokens.size());
    for (size_t i = 0; i < squares.size(); ++i) {
      const double x = tokens.old_logp[i] - tokens.rollout_logp[i];
      squares[i] = x * x;
    }
    const std::vector<size_t> order = descending(squares);
    // From the small end: the longest run whose mean is below the threshold.
    double sum = 0, count = 0;
    size_t kept = order.empty() ? 0 : 1;
    for (size_t n = 1; n <= order.size(); ++n) {
      const size_t i = order[order.size() - n];
      sum += tokens.weight[i] * squares[i];
      count += tokens.weight[i];
      if (sum < threshold * count) kept = n;
    }
    for (size_t k = 0; k + kept < order.size(); ++k) out[order[k]] = 0;
  }
};

}  // namespace tether
