#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "../batch_weight.h"

namespace tether {

// 1 at the tokens of highest entropy, the forks of a reasoning, else 0: those at or above the
// quantile 1 - share, which lies between two entropies where it must (linear interpolation). A
// token of a fractional weight counts as one.
//
// Wang et al. 2025, arXiv:2506.01939, eq. 5. As token_weights, what TRL's top_entropy_quantile
// does; times the mask, where the others shall not be counted.
struct TopEntropy {
  double share = 0.2;

  static constexpr BatchNeeds needs{.entropies = true};
  static constexpr auto fields() { return std::tuple{field("share", &TopEntropy::share, {0, 1})}; }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    if (tokens.size() == 0) return;
    std::vector<double> sorted = tokens.entropy;
    std::sort(sorted.begin(), sorted.end());
    const double place = (1 - share) * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<size_t>(place);
    const size_t above = std::min(below + 1, sorted.size() - 1);
    const double threshold = std::lerp(sorted[below], sorted[above], place - std::floor(place));
    for (size_t i = 0; i < out.size(); ++i) out[i] = tokens.entropy[i] >= threshold ? 1 : 0;
  }
};

}  // namespace tether
