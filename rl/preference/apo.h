#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// Anchored preference optimization: what happens to each answer and not to their gap alone. With
// u = beta (g(S) - baseline) and the margin x:
//
//   apo_zero   1 - sigmoid(u_chosen) + sigmoid(u_rejected)    chosen up, rejected down
//   apo_down   sigmoid(u_chosen) + 1 - sigmoid(x)             both down, the rejected one more
//
// D'Oosterlinck et al. 2024, arXiv:2408.06266, eqs. 7 and 8: the first where the chosen answers are
// better than the model's own, the second where they are worse.
struct ApoZero {
  static constexpr Traits traits{.pulls_back = false};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return sigmoid(-pair.reward_of(pair.chosen)) + sigmoid(pair.reward_of(pair.rejected));
  }
};
struct ApoDown {
  static constexpr Traits traits{.pulls_back = false};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return sigmoid(pair.reward_of(pair.chosen)) + sigmoid(-pair.margin());
  }
};

namespace presets {

inline PreferenceObjective apo_zero(double beta = 0.1) { return {.beta = beta, .loss = ApoZero{}}; }
inline PreferenceObjective apo_down(double beta = 0.1) { return {.beta = beta, .loss = ApoDown{}}; }

}  // namespace presets

}  // namespace tether
