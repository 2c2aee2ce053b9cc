#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// PPO clipped surrogate of one token, as a loss to be minimised.
//
//   ratio = exp(log_ratio),  log_ratio = logp - old_logp                                [nats]
//   loss  = -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)
//   A < 0:  loss = min(loss, -dual_clip A)          with a dual clip, dual_clip > 1
//
// d loss / d logp = -ratio A where the unclipped branch is taken, exactly 0 where it is clipped; at
// a bound the gradient is the one inside.
// Schulman et al. 2017, arXiv:1707.06347, eq. 7. Two epsilons: DAPO, arXiv:2503.14476, eq. 10.
// Dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5; off here, 3 in verl's "vanilla".
struct PpoClip {
  double epsilon_low = 0.2;
  double epsilon_high = 0.2;
  double dual_clip = infinity;  // off

  static constexpr Traits traits{.clips = true};
  static constexpr auto fields() {
    return std::tuple{field("epsilon_low", &PpoClip::epsilon_low, {0, 1}),
                      field("epsilon_high", &PpoClip::epsilon_high, {0, infinity}),
                      field("dual_clip", &PpoClip::dual_clip, {1, infinity, true})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const Constant A = token.advantage;
    const Number clipped = clamp(token.ratio, 1 - epsilon_low, 1 + epsilon_high);
    const Number loss = -min(token.ratio * A, clipped * A);
    return select(A < 0, min(loss, -dual_clip * A), loss);
  }
};

namespace presets {

// PPO: the clipped surrogate, averaged over the tokens of the batch. arXiv:1707.06347, eq. 7.
// The advantage that belongs to it: generalized advantage estimation.
inline PolicyObjective ppo(const PpoClip& clip = {}) {
  return {.surrogate = clip, .aggregation = token_mean()};
}

// PPO with a dual clip: a bad token that became much too likely pulls with at most dual_clip |A|.
// Ye et al. 2020, arXiv:1912.09729, eq. 5, c = 3 (verl's "vanilla").
inline PolicyObjective ppo_dual_clip(const PpoClip& clip = {.dual_clip = 3}) { return ppo(clip); }

}  // namespace presets
}  // namespace tether
