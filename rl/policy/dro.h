#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The policy gradient with a square that pulls back to the old policy.
//
//   loss = -(A logp - tau/2 u^2),   d loss / d logp = -A + tau u,   u = logp - old_logp     [nats]
//
// No ratio enters: the sample may be of any policy, and u is what A / tau asks for at the minimum.
// DRO: Richemond et al. 2024, arXiv:2405.19107, eq. 8 over tau.
struct QuadraticPull {
  double tau = 0.1;

  static constexpr Traits traits{.of_log_ratio = false, .homogeneous = false};
  static constexpr auto fields() {
    return std::tuple{field("tau", &QuadraticPull::tau, {0, largest_option})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.log_ratio * token.log_ratio * (tau / 2) - token.advantage * token.logp;
  }
};

namespace presets {

// DRO by tokens, as verl has it (`dro_beta` is tau).
inline PolicyObjective dro(const QuadraticPull& pull = {}) {
  return {.surrogate = pull, .aggregation = token_mean()};
}

// Kimi k1.5: the same of whole answers, sums over their tokens. arXiv:2501.12599, eq. 3. The
// advantage that belongs to it is the reward minus the group's mean, not scaled.
inline PolicyObjective kimi(const QuadraticPull& pull = {}) {
  return {.level = RatioLevel::sequence_sum,
          .surrogate = pull,
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace presets
}  // namespace tether
