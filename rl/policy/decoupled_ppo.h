#pragma once

#include "importance.h"
#include "ppo.h"

namespace tether::presets {

// Decoupled PPO: the clip holds the policy near a proximal one, and a weight corrects for the
// policy that sampled.
//
//   loss = -pi_prox / pi_behaviour min(ratio A, clip(ratio) A),   ratio = pi / pi_prox
//
// old_logps are the proximal policy's, rollout_logps the behaviour's. Hilton et al. 2022,
// arXiv:2110.00641, section 2. PPO-EWMA has a moving average of the weights as the proximal policy.
inline PolicyObjective decoupled_ppo(const PpoClip& clip = {}, double weight_high = infinity) {
  return weighed(ppo(clip), TruncatedImportance{.low = 0, .high = weight_high});
}

}  // namespace tether::presets
