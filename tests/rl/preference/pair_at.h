#pragma once

#include "rl/preference_objective.h"

namespace tether {

// A pair of these scores, whose derivatives are by the chosen and by the rejected one.
inline Pair<Dual<double, 2>> pair_at(double chosen, double rejected, double beta) {
  using Score = Dual<double, 2>;
  const Score first{chosen, {1, 0}}, second{rejected, {0, 1}};
  return {{first, first, {0}, {1}}, {second, second, {0}, {1}}, beta};
}

}  // namespace tether
