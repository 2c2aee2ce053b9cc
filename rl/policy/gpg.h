#pragma once

#include "reinforce.h"

namespace tether::presets {

// GPG: the policy gradient over the tokens of the batch, with neither ratio nor reference.
//
//   loss = -1/tokens sum_it A_i logp_it
//
// arXiv:2504.02546. What is its own is in the advantages: rewards minus the group's mean,
// not scaled, and groups without a signal left out.
inline PolicyObjective gpg() { return reinforce(); }

}  // namespace tether::presets
