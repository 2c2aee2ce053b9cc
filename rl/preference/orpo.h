#pragma once

#include "../preference_objective.h"
#include "dpo.h"
#include "log_odds.h"

namespace tether::presets {

// ORPO: supervised learning of the chosen answer, and the odds of it over those of the rejected
// one.
//
//   loss = NLL(chosen) - lambda log sigmoid(log_odds_chosen - log_odds_rejected)
//
// Without a reference, of mean log-probabilities. Hong et al. 2024, arXiv:2403.07691, eq. 6. The
// authors' code and TRL average the NLL over prompt and answer: pass that mask as nll_mask.
inline PreferenceObjective orpo(double lambda = 0.1) {
  return {.score = PairScore::mean,
          .reference = false,
          .link = LogOdds{},
          .beta = 1,
          .loss = LogisticPair{},
          .loss_weight = lambda,
          .nll = {.coefficient = 1}};
}

}  // namespace tether::presets
