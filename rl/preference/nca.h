#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// Two answers told apart from noise, each by itself. With u = beta (g(S) - baseline):
//
//   loss = -log sigmoid(u_chosen) - 1/2 log sigmoid(-u_chosen) - 1/2 log sigmoid(-u_rejected)
//
// d loss / d u_chosen = 1/2 - 3/2 sigmoid(-u_chosen): least at sigmoid(u_chosen) = 2/3, so that the
// chosen answer does not become less likely. NCA: Chen et al. 2024, arXiv:2402.05369.
struct NcaPair {
  static constexpr Traits traits{};

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number chosen = pair.reward_of(pair.chosen), rejected = pair.reward_of(pair.rejected);
    return chosen * 0.5 - log_sigmoid(chosen) * 1.5 - log_sigmoid(-rejected) * 0.5;
  }
};

namespace presets {

inline PreferenceObjective nca_pair(double beta = 0.1) { return {.beta = beta, .loss = NcaPair{}}; }

}  // namespace presets

}  // namespace tether
