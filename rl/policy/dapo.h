#pragma once

#include "ppo.h"

namespace tether::presets {

// DAPO: clip-higher and one mean over all tokens of the optimizer step, without a KL penalty.
//
//   loss = 1/sum_i |o_i|  sum_i sum_t PpoClip(epsilon_low = 0.2, epsilon_high = 0.28)
//
// Yu et al. 2025, arXiv:2503.14476, eq. 10 and 12. The token count is the step's, over all
// micro-batches and ranks: pass it as Normalizer. Dynamic sampling and the overlong penalty are
// choices about data and reward, made before the loss. Advantages: group_advantage.
inline PolicyObjective dapo() {
  return {.surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
          .aggregation = token_mean()};
}

}  // namespace tether::presets
