#pragma once

#include "clip_mask.h"
#include "reinforce.h"

namespace tether::presets {

// Group-relative REINFORCE with a mask and no importance weight, arXiv:2509.24203: one-sided as
// PPO's clip, two-sided, and two-sided with a ring.
inline PolicyObjective rec_one_side(const ClipMask& mask = {}) {
  return weighed(reinforce(), mask);
}
inline PolicyObjective rec_ring(const RingMask& mask = {}) { return weighed(reinforce(), mask); }
inline PolicyObjective rec_two_side(double epsilon_low = 0.2, double epsilon_high = 0.2) {
  return rec_ring({epsilon_low, epsilon_high, 1, infinity});
}

}  // namespace tether::presets
