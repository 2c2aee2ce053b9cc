#pragma once

#include "reinforce.h"
#include "soft_sequence.h"

namespace tether::presets {

// VESPO: REINFORCE of the tokens, weighed by answers, arXiv:2602.10693, eq. 20.
//
//   loss = -W A logp,   W of soft_sequence.h
inline PolicyObjective vespo(const SoftSequenceWeight& weight = {}) {
  return weighed(reinforce(), weight);
}

}  // namespace tether::presets
