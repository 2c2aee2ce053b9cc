#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The logistic loss of a pair's margin x, freed from the bias of labels of which a share is
// flipped.
//
//   loss = ((1 - e) -log sigmoid(x) - e -log sigmoid(-x)) / (1 - 2 e)
//        = -log sigmoid(x) - e / (1 - 2 e) x,   e = label_smoothing
//
// d loss / d x = -sigmoid(-x) - e / (1 - 2 e): it has no least value. rDPO: Chowdhury, Kini and
// Natarajan 2024, arXiv:2403.00409. cdpo is the other answer to flipped labels, with a
// target in place of a correction.
struct RobustPair {
  double label_smoothing = 0.1;

  static constexpr Traits traits{};
  static constexpr auto fields() {
    return std::tuple{field("label_smoothing", &RobustPair::label_smoothing, {0, 0.499})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number x = pair.margin();
    return x * (-label_smoothing / (1 - 2 * label_smoothing)) - log_sigmoid(x);
  }
};

namespace presets {

inline PreferenceObjective robust(double beta = 0.1, double label_smoothing = 0.1) {
  return {.beta = beta, .loss = RobustPair{label_smoothing}};
}

}  // namespace presets

}  // namespace tether
