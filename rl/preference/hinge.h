#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The hinge loss of a pair's margin x.
//
//   loss = max(0, 1 - x),   d loss / d x = -1 for x < 1, else 0
//
// SLiC-HF: Zhao et al. 2023, arXiv:2305.10425, eq. 3, with the margin of the implicit rewards: RSO,
// Liu et al. 2023, arXiv:2309.06657, eq. 9.
struct HingePair {
  static constexpr Traits traits{};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number slack = 1 - pair.margin();
    return select(slack > 0, slack, slack * 0);
  }
};

namespace presets {

inline PreferenceObjective hinge(double beta = 0.1) { return {.beta = beta, .loss = HingePair{}}; }

}  // namespace presets
}  // namespace tether
