#pragma once

#include "ppo.h"

namespace tether::presets {

// Dr. GRPO: GRPO without its two biases. Sums over tokens are divided by a constant, not by the
// length of each answer.
//
//   loss = 1/N sum_i 1/constant sum_t PpoClip_t
//
// Liu et al. 2025, arXiv:2503.20783, section 3.2. `constant` is the budget of tokens per answer
// (TRL: max_completion_length). Advantages: group_advantage without a scale.
inline PolicyObjective dr_grpo(double constant = 1, const PpoClip& clip = {}) {
  return {.surrogate = clip, .aggregation = sequence_sum_over_constant(constant)};
}

}  // namespace tether::presets
