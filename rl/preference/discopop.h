#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The logistic loss of a pair's margin x where the model is wrong, an exponential one where it is
// right, mixed by m = sigmoid(x / tau).
//
//   loss = (1 - m) -log sigmoid(x) + m e^-x
//
// Evaluated as e^(-x + log m), which stays finite where e^-x does not. It is not monotone: from x =
// 0 to a little above, more margin costs more. Found by a language model: DiscoPOP, Lu et al. 2024,
// arXiv:2406.08414, eq. 5.
struct DiscoPair {
  double tau = 0.05;

  static constexpr Traits traits{.pulls_back = false};  // not of pairs a little in the wrong order
  static constexpr auto fields() { return std::tuple{field("tau", &DiscoPair::tau, {1e-3, 1})}; }

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number x = pair.margin(), y = x * (1 / tau);
    return exp(log_sigmoid(y) - x) - sigmoid(-y) * log_sigmoid(x);
  }
};

namespace presets {

inline PreferenceObjective discopop(double beta = 0.1, double tau = 0.05) {
  return {.beta = beta, .loss = DiscoPair{tau}};
}

}  // namespace presets

}  // namespace tether
