#pragma once

#include "ppo.h"

namespace tether::presets {

// BNPO: GRPO with one mean over the tokens of the batch, and no penalty unless asked for.
//
//   loss = 1/sum_i |o_i|  sum_i sum_t PpoClip_t
//
// TRL's loss_type "bnpo". There the batch is the micro-batch, so that the loss depends on how the
// step is split; here that is the call without a Normalizer. With one it is dapo with equal bounds.
inline PolicyObjective bnpo(double beta = 0, const PpoClip& clip = {}) {
  return {.surrogate = clip, .kl = {.beta = beta}, .aggregation = token_mean()};
}

}  // namespace tether::presets
