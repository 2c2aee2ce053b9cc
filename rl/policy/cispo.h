#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../surrogate.h"
#include "../token.h"

namespace tether {

// REINFORCE with a clipped importance weight that is a constant.
//
//   loss = -sg(clip(ratio, ratio_low, ratio_high)) A logp,   d loss / d logp = -clip(ratio, ...) A
//
// Every token keeps a gradient, beyond the bounds too; the bounds are of the ratio itself, not of
// its distance from 1. CISPO: MiniMax-M1, arXiv:2506.13585, eq. 4 and 5, which has no lower bound.
// verl and NeMo-RL clip to [0.8, 1.2] by default, TRL recommends an upper bound of 5.
struct IsReinforce {
  double ratio_low = 0;
  double ratio_high = 5;

  static constexpr Traits traits{.stops_gradient = true, .of_log_ratio = false};
  static constexpr auto fields() {
    return std::tuple{field("ratio_low", &IsReinforce::ratio_low, {0, largest_option}),
                      field("ratio_high", &IsReinforce::ratio_high, {0, infinity, true})};
  }

  RatioInterval truncation() const { return {ratio_low, ratio_high}; }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -stop_gradient(clamp(token.ratio, ratio_low, ratio_high)) * token.advantage * token.logp;
  }
};

namespace presets {

// CISPO: one mean over all tokens of the optimizer step. Advantages: group_advantage.
inline PolicyObjective cispo(const IsReinforce& weight = {}) {
  return {.surrogate = weight, .aggregation = token_mean()};
}

}  // namespace presets
}  // namespace tether
