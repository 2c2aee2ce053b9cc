#pragma once

#include "../policy_objective.h"
#include "linear.h"

namespace tether::presets {

// The unclipped surrogate with a penalty on the tokens whose log-probability goes most with the
// advantage: those that take the entropy.
//
//   loss = -ratio A + beta v |log ratio|,   v = 1 at those tokens, else 0
//
// Cui et al. 2025, arXiv:2505.22617, eq. 14. v are the caller's kl_weights (KlCovPicks finds them);
// without them every token is penalised.
inline PolicyObjective kl_cov(double beta = 1) {
  PolicyObjective out = linear();
  out.kl = {.beta = beta,
            .estimator = KlAbs{},
            .gradient = KlAbs{},
            .reference = KlReference::old,
            .allow_biased_gradient = true};
  return out;
}

}  // namespace tether::presets
