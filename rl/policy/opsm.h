#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// Off-policy sequence masking: a bad answer that the policy has moved away from teaches nothing.
//
//   W = 0 where A < 0 and x > high, else 1,   x = mean over the answer of old_logp - logp    [nats]
//
// DeepSeek-V3.2: arXiv:2512.02556. It states no bound: TRL's documentation has 0.5,
// slime 1e-4. Where the engine's log-probabilities are known, pass them as old_logps.
struct OffPolicyMask {
  double high = 0.5;

  static constexpr WeightLevel level = WeightLevel::sequence_mean;
  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() { return bound_from_above<OffPolicyMask>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.old_logp - token.logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    return select(token.advantage < 0, one_up_to(x, high), 0 * x + 1);
  }
};

}  // namespace tether
