#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The squared distance of each log-ratio h = g(S) - baseline from its own target.
//
//   loss = (h_chosen - 1 / (2 beta))^2 + (h_rejected + 1 / (2 beta))^2
//
// Where ipo ties the gap to 1 / (2 beta), this ties both ends. SPPO, with preferences of 0 and 1:
// Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
struct SquareAnswers {
  static constexpr Traits traits{};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    constexpr double kLeastBeta = 1e-290;  // the target is finite
    const double target = 1 / (2 * (pair.beta > kLeastBeta ? pair.beta : kLeastBeta));
    const Number chosen = pair.chosen.score - pair.chosen.baseline - target;
    const Number rejected = pair.rejected.score - pair.rejected.baseline + target;
    return chosen * chosen + rejected * rejected;
  }
};

namespace presets {

inline PreferenceObjective sppo_hard(double beta = 0.1) {
  return {.beta = beta, .loss = SquareAnswers{}};
}

}  // namespace presets

}  // namespace tether
