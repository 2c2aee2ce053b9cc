#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"

namespace tether {

// Self-distillation: a teacher, whose log-probabilities are ref_logps, says which tokens of an
// answer earned its advantage.
//
//   W = 1 - mix + mix clip(e^(sign(A) x), 1 - epsilon, 1 + epsilon),   x = ref_logp - logp
//
// RLSD: arXiv:2604.03128; constants of ms-swift.
struct SelfDistillation {
  double mix = 0.5;
  double epsilon = 0.2;

  static constexpr Traits traits{.needs_ref_logps = true, .reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("mix", &SelfDistillation::mix, {0, 1}),
                      field("epsilon", &SelfDistillation::epsilon, {0, 1})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.ref_logp - token.logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number signed_x = select(token.advantage < 0, -x, select(token.advantage > 0, x, 0 * x));
    const Number gain = exp(signed_x);
    return clamp(gain, 1 - epsilon, 1 + epsilon) * mix + (1 - mix);
  }
};

}  // namespace tether
