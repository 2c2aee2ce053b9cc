#pragma once

#include "masked_ratio.h"
#include "reinforce.h"

namespace tether::presets {

// REINFORCE with the importance weight to the policy that sampled, whose log-probabilities are
// old_logps; a token beyond the bounds has no gradient.
//
//   loss = -W A logp,   W of masked_ratio.h
//
// SkyRL's rollout_is, whose bounds are open.
inline PolicyObjective rollout_is(const MaskedRatio& weight = {}) {
  return weighed(reinforce(), weight);
}

}  // namespace tether::presets
