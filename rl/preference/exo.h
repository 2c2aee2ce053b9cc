#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../preference_objective.h"

namespace tether {

// The reverse KL divergence from what a pair's margin x says of its order to what the label says,
// with a share of labels taken for flipped.
//
//   loss = KL(Bernoulli(q) || Bernoulli(1 - e)),   q = sigmoid(x), e = label_smoothing
//
// d loss / d x = q (1 - q) (x - logit(1 - e)): 0 on both far sides. EXO: Ji et al. 2024,
// arXiv:2402.00856, eq. 16, which recommends a small e > 0.
struct ExoPair {
  double label_smoothing = 1e-3;

  static constexpr Traits traits{.pulls_back = false};
  static constexpr auto fields() {
    return std::tuple{field("label_smoothing", &ExoPair::label_smoothing, {1e-300, 0.5})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    const Number x = pair.margin();
    return sigmoid(x) * (log_sigmoid(x) - math::log1p(-label_smoothing)) +
           sigmoid(-x) * (log_sigmoid(-x) - math::log(label_smoothing));
  }
};

namespace presets {

inline PreferenceObjective exo_pair(double beta = 0.1, double label_smoothing = 1e-3) {
  return {.beta = beta, .loss = ExoPair{label_smoothing}};
}

}  // namespace presets

}  // namespace tether
