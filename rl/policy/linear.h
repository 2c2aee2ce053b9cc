#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The importance-weighted surrogate without a clip: conservative policy iteration.
//
//   loss = -ratio A,     d loss / d logp = -ratio A
//
// Schulman et al. 2017, arXiv:1707.06347, eq. 6. Unbiased on samples of the old policy, of a
// variance without a bound; for masks that decide elsewhere who moves (rl/policy/trust_region.h).
struct LinearRatio {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -token.ratio * token.advantage;
  }
};

namespace presets {

// The mean over the tokens of the batch.
inline PolicyObjective linear() {
  return {.surrogate = LinearRatio{}, .aggregation = token_mean()};
}

}  // namespace presets
}  // namespace tether
