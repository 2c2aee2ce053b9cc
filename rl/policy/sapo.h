#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The soft gate of SAPO in place of a clip, as a loss to be minimised.
//
//   loss = -(4 / tau) sigmoid(tau (ratio - 1)) A,   tau = tau_pos where A > 0, else tau_neg
//   d loss / d logp = -4 g (1 - g) ratio A,         g = sigmoid(tau (ratio - 1))
//
// At ratio 1 the gradient is that of the policy gradient, -A, and the value -2 A / tau: values at
// different tau do not compare. Away from 1 the gradient fades on both sides and is 0 nowhere but
// by underflow, so no token counts as clipped until then. The larger tau_neg lets it fade sooner
// for bad tokens.
// SAPO: arXiv:2511.20347, eq. 5 and 6.
struct SoftGate {
  double tau_pos = 1;
  double tau_neg = 1.05;

  static constexpr Traits traits{.pulls_back = false};
  static constexpr auto fields() {
    return std::tuple{field("tau_pos", &SoftGate::tau_pos, {1e-6, 1e6}),
                      field("tau_neg", &SoftGate::tau_neg, {1e-6, 1e6})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const Constant A = token.advantage;
    const Constant zero = 0 * A;  // options as numbers to choose from
    const Constant tau = select(A > 0, zero + tau_pos, zero + tau_neg);
    return -(4 / tau) * sigmoid(tau * (token.ratio - 1)) * A;
  }
};

namespace presets {

// SAPO: the soft gate, averaged over the tokens of each answer, then over answers. Advantages:
// group_advantage.
inline PolicyObjective sapo(const SoftGate& gate = {}) {
  return {.surrogate = gate, .aggregation = sequence_mean_token_mean()};
}

}  // namespace presets
}  // namespace tether
