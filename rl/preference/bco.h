#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// A classifier of good and bad, whose logit is the implicit reward, of both answers of a pair. With
// u = beta (g(S) - baseline), the baseline the paper's reward shift delta:
//
//   loss = -log sigmoid(u_chosen) - log sigmoid(-u_rejected)
//
// BCO: Jung et al. 2024, arXiv:2404.04656, of pairs as TRL has it.
struct BcoPair {
  static constexpr Traits traits{};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return -log_sigmoid(pair.reward_of(pair.chosen)) - log_sigmoid(-pair.reward_of(pair.rejected));
  }
};

namespace presets {

inline PreferenceObjective bco_pair(double beta = 0.1) { return {.beta = beta, .loss = BcoPair{}}; }

}  // namespace presets

}  // namespace tether
