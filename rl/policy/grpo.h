#pragma once

#include "ppo.h"

namespace tether::presets {

// GRPO: the clipped surrogate and the k3 penalty, averaged over each answer, then over the answers.
//
//   loss = 1/N sum_i 1/|o_i| sum_t [ PpoClip_t + beta k3_t ],   k3 of KL(policy || reference)
//
// Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3 and 4. The advantage that belongs to it:
// group_advantage. The paper has beta = 0.04; the default is the field's, no penalty and no
// reference.
inline PolicyObjective grpo(double beta = 0, const PpoClip& clip = {}) {
  return {.surrogate = clip, .kl = {.beta = beta}, .aggregation = sequence_mean_token_mean()};
}

}  // namespace tether::presets
