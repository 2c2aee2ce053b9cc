#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The clipped ratio without PPO's minimum.
//
//   loss = -clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A
//
// A token outside of the band has no gradient on either side: one that ran away to the wrong side
// is not brought back. torchrl's CISPOLoss, which is not CISPO (rl/policy/cispo.h).
struct BandClip {
  double epsilon_low = 0.2;
  double epsilon_high = 0.2;

  static constexpr Traits traits{.clips_both_sides = true, .pulls_back = false};
  static constexpr auto fields() {
    return std::tuple{field("epsilon_low", &BandClip::epsilon_low, {0, 1}),
                      field("epsilon_high", &BandClip::epsilon_high, {0, infinity})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -clamp(token.ratio, 1 - epsilon_low, 1 + epsilon_high) * token.advantage;
  }
};

namespace presets {

// The mean over the tokens of the batch.
inline PolicyObjective band(const BandClip& clip = {}) {
  return {.surrogate = clip, .aggregation = token_mean()};
}

}  // namespace presets
}  // namespace tether
