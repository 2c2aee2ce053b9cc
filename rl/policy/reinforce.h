#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The score-function surrogate of one token.
//
//   loss = -A logp,     d loss / d logp = -A
//
// Williams 1992, "Simple statistical gradient-following algorithms", eq. 4. It does not look at the
// old policy: on samples of an older policy its gradient is biased.
struct Reinforce {
  static constexpr Traits traits{.of_log_ratio = false};

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -token.advantage * token.logp;
  }
};

namespace presets {

// REINFORCE over the tokens of the batch; any baseline is in the advantages.
inline PolicyObjective reinforce() {
  return {.surrogate = Reinforce{}, .aggregation = token_mean()};
}

}  // namespace presets
}  // namespace tether
