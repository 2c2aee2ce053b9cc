#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// A quadratic pull to the old policy in place of a clip, as strong as the advantage.
//
//   loss            = -ratio A + |A| w (ratio - 1)^2 / (2 epsilon),   w = sg(e^old_logp)^power
//   d loss / d logp = -ratio A (1 - sign(A) w (ratio - 1) / epsilon)
//
// The gradient is that of -ratio A at ratio 1, 0 where w |ratio - 1| = epsilon on the side that the
// advantage asks for, and beyond turns back, where a clip has none. With power 0 the bound is one
// of the ratio, with 1 of the probability: ratio - 1 times e^old_logp is how far it has moved.
// The old probability is that which logp and ratio tell of: where a token has the ratio of its
// answer (level sequence_token), no policy's. SPO: arXiv:2401.16025; on the tokens of an answer
// CFPO: arXiv:2601.22801, eq. 7. With power 1 DRPO: arXiv:2606.09821, eq. 8, whose epsilon of 12.5
// is larger than any move of a probability.
struct QuadraticBound {
  double epsilon = 0.2;
  double power = 0;

  static constexpr Traits traits{.of_log_ratio = false};
  static constexpr auto fields() {
    return std::tuple{field("epsilon", &QuadraticBound::epsilon, {1e-6, 1e6}),
                      field("power", &QuadraticBound::power, {0, 1})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const Constant A = token.advantage;
    // A probability is at most 1.
    const auto w = exp(min(stop_gradient(token.logp - token.log_ratio), 0.0) * power);
    const Number away = expm1(token.log_ratio);
    return abs(A) * w * away * away / (2 * epsilon) - token.ratio * A;
  }
};

namespace presets {

// CFPO: the mean over the tokens of each answer, then over answers, as GRPO. Advantages:
// group_advantage.
inline PolicyObjective cfpo(double epsilon = 0.2) {
  return {.surrogate = QuadraticBound{.epsilon = epsilon},
          .aggregation = sequence_mean_token_mean()};
}

// DRPO: the mean over the tokens of the batch. Advantages: group_advantage without the standard
// deviation.
inline PolicyObjective drpo(double epsilon = 12.5) {
  return {.surrogate = QuadraticBound{.epsilon = epsilon, .power = 1}, .aggregation = token_mean()};
}

}  // namespace presets
}  // namespace tether
