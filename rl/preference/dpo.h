#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The logistic loss of a pair's margin x, with a share of labels taken for flipped.
//
//   loss = -(1 - label_smoothing) log sigmoid(x) - label_smoothing log sigmoid(-x)
//        = -log sigmoid(x) + label_smoothing x
//
// d loss / d x = -sigmoid(-x) + label_smoothing: least at x = logit(1 - label_smoothing).
// Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Conservative DPO: Mitchell 2023,
// ericmitchell.ai/cdpo.pdf. TRL's "sigmoid" ignores its label_smoothing.
struct LogisticPair {
  double label_smoothing = 0;

  static constexpr Traits traits{};
  static constexpr auto fields() {
    return std::tuple{field("label_smoothing", &LogisticPair::label_smoothing, {0, 0.5})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number x = pair.margin();
    return x * label_smoothing - log_sigmoid(x);
  }
};

namespace presets {

// DPO: x = beta (log-ratio of the chosen answer - log-ratio of the rejected one).
inline PreferenceObjective dpo(double beta = 0.1) { return {.beta = beta, .loss = LogisticPair{}}; }

// cDPO: DPO with label smoothing.
inline PreferenceObjective cdpo(double beta = 0.1, double label_smoothing = 0.1) {
  return {.beta = beta, .loss = LogisticPair{label_smoothing}};
}

}  // namespace presets
}  // namespace tether
