#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The squared distance of the log-ratio gap h = g(S_chosen) - g(S_rejected) from its target.
//
//   loss = (h - 1 / (2 beta))^2
//
// beta is the paper's tau. Azar et al. 2023, arXiv:2310.12036, eq. 17.
struct SquarePair {
  static constexpr Traits traits{};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    constexpr double kLeastBeta = 1e-290;  // the target is finite
    const double beta = pair.beta > kLeastBeta ? pair.beta : kLeastBeta;
    const Number gap = pair.gap() - 1 / (2 * beta);
    return gap * gap;
  }
};

namespace presets {

// IPO on mean log-ratios per token, as in TRL; the paper's own has score = sum.
inline PreferenceObjective ipo(double beta = 0.1) {
  return {.score = PairScore::mean, .beta = beta, .loss = SquarePair{}};
}

}  // namespace presets
}  // namespace tether
