#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The utility of one answer, good or bad, by prospect theory. With u = beta (S - z), z the
// baseline:
//
//   loss = desirable_weight (1 - sigmoid(u))       label above 1/2
//          undesirable_weight (1 - sigmoid(-u))    else
//
// d loss / d u = -+weight sigmoid(u) sigmoid(-u): an answer far from z on either side is left
// alone. Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8. z estimates KL(policy || reference), not
// below 0: the mean log-ratio of answers to other prompts, the same number for all answers of a
// step.
struct KahnemanTversky {
  double desirable_weight = 1;
  double undesirable_weight = 1;

  static constexpr Traits traits{.pulls_back = false};
  static constexpr auto fields() {
    using Kt = KahnemanTversky;
    return std::tuple{field("desirable_weight", &Kt::desirable_weight, {0, largest_option}),
                      field("undesirable_weight", &Kt::undesirable_weight, {0, largest_option})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const LabelledAnswer<Number>& answer) const {
    const Number u = answer.reward();
    return select(answer.label > 0.5, sigmoid(-u) * desirable_weight,
                  sigmoid(u) * undesirable_weight);
  }
};

namespace presets {

// KTO: answers with labels, in any order, and a baseline.
inline PreferenceObjective kto(double beta = 0.1) {
  return {.beta = beta, .loss = KahnemanTversky{}};
}

}  // namespace presets
}  // namespace tether
