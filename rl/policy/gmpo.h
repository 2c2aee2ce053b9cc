#pragma once

#include "ppo.h"

namespace tether::presets {

// GMPO: the geometric mean of the tokens' ratios, each clipped by itself.
//
//   loss = -1/N sum_i s_i A_i,   s_i = exp(1/|o_i| sum_t v_t)
//   v_t  = min(u_t, clip) where A_i >= 0,   max(u_t, -clip) where A_i < 0
//   u_t  = logp_t - old_logp_t                                                              [nats]
//
// Zhao et al. 2025, arXiv:2507.20673, eq. 4; bounds of e^-0.4 and e^0.4 (section 4). A token beyond
// its bound gets no gradient, the others of its sequence do.
inline PolicyObjective gmpo(double clip = 0.4) {
  return {.level = RatioLevel::sequence_mean,
          .log_ratio_clip = {clip, clip},
          .surrogate = PpoClip{.epsilon_low = 1, .epsilon_high = infinity},
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace tether::presets
