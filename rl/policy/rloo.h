#pragma once

#include "ppo.h"

namespace tether::presets {

// RLOO: the sequence is one action, so its ratio is the product over its tokens.
//
//   r_i = exp(sum_t (logp_t - old_logp_t)),   loss = 1/N sum_i PpoClip(r_i, A_i)
//
// On-policy (r_i = 1) the gradient is REINFORCE's, -A_i sum_t grad logp_t: Ahmadian et al. 2024,
// arXiv:2402.14740, eq. 6. Off-policy it is clipped like TRL's RLOO trainer. The advantage that
// belongs to it: group_advantage with the leave-one-out baseline and no scale.
inline PolicyObjective rloo(const PpoClip& clip = {}) {
  return {.level = RatioLevel::sequence_sum,
          .surrogate = clip,
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace tether::presets
