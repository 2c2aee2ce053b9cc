#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// REINFORCE whose importance weight is of bad samples alone, and tapers off with them.
//
//   loss = -W A logp,   d loss / d logp = -W A
//   W    = weight_pos where A >= 0,   weight_neg sg(min(ratio, ratio_high)) where A < 0
//
// A good sample is learnt from however unlikely it has become, a bad one that the policy already
// avoids is left alone. The sign is that of A: pass rewards around a baseline that is not the
// group's where the paper's sign of the reward is meant.
// TOPR: arXiv:2503.14286.
struct TaperedReinforce {
  double weight_pos = 1;
  double weight_neg = 1;
  double ratio_high = 1;

  static constexpr Traits traits{.stops_gradient = true, .of_log_ratio = false};
  static constexpr auto fields() {
    return std::tuple{field("weight_pos", &TaperedReinforce::weight_pos, {0, largest_option}),
                      field("weight_neg", &TaperedReinforce::weight_neg, {0, largest_option}),
                      field("ratio_high", &TaperedReinforce::ratio_high, {0, infinity, true})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const auto tapered = stop_gradient(min(token.ratio, ratio_high)) * weight_neg;
    const auto weight = select(token.advantage < 0, tapered, 0 * tapered + weight_pos);
    // W A may overflow where logp is 0.
    return -(weight * token.logp) * token.advantage;
  }
};

namespace presets {

// TOPR: ratios and log-probabilities of whole answers. With level token: ROLL's.
inline PolicyObjective topr(const TaperedReinforce& weight = {}) {
  return {.level = RatioLevel::sequence_sum,
          .surrogate = weight,
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace presets
}  // namespace tether
