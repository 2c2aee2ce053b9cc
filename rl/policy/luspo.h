#pragma once

#include "gspo.h"

namespace tether::presets {

// LUSPO: GSPO whose answers count by their length.
//
//   loss = 1/N sum_i |o_i| PpoClip(s_i, A_i),   s_i the geometric mean of the tokens' ratios
//
// arXiv:2602.05261, eq. 7. The mean over tokens that GSPO takes out of its gradient is put back: a
// token of a long answer counts as much as one of a short answer.
inline PolicyObjective luspo(const PpoClip& clip = {.epsilon_low = 3e-4, .epsilon_high = 4e-4}) {
  return {.level = RatioLevel::sequence_mean,
          .surrogate = clip,
          .aggregation = sequence_mean_token_sum()};
}

}  // namespace tether::presets
