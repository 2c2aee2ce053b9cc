#pragma once

#include "ppo.h"

namespace tether::presets {

// GSPO: the clipped surrogate of the sequence's ratio, the geometric mean of its tokens' ratios.
//
//   s_i = exp(1/|o_i| sum_t (logp_t - old_logp_t)),   loss = 1/N sum_i PpoClip(s_i, A_i)
//
// Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7. The bounds are much tighter than a token's
// (section 5.1: 3e-4 and 4e-4). Advantages: group_advantage.
inline PolicyObjective gspo(const PpoClip& clip = {.epsilon_low = 3e-4, .epsilon_high = 4e-4}) {
  return {.level = RatioLevel::sequence_mean,
          .surrogate = clip,
          .aggregation = sequence_mean_token_mean()};
}

// GSPO-token: the value of GSPO; the gradient of each token has its own advantage.
// arXiv:2507.18071, eq. 13 and 14. With one advantage per sequence its gradient is GSPO's too.
inline PolicyObjective gspo_token(const PpoClip& clip = {.epsilon_low = 3e-4,
                                                         .epsilon_high = 4e-4}) {
  return {.level = RatioLevel::sequence_token,
          .surrogate = clip,
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace tether::presets
