#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// The soft weight of an answer by its ratio rho, the product of its tokens' ratios.
//
//   W = rho^k e^(lambda (1 - rho)),   k, lambda by the sign of A
//
// 1 at rho = 1, largest at rho = k / lambda (at most e^60 is taken), and 0 towards both ends: no
// clip, and no length that the ratio is divided by. VESPO: arXiv:2602.10693, eq. 20.
// Where the engine's log-probabilities are known, pass them as old_logps: rho is then the ratio to
// what sampled.
struct SoftSequenceWeight {
  double k_pos = 2, lambda_pos = 3;
  double k_neg = 3, lambda_neg = 2;

  static constexpr WeightLevel level = WeightLevel::sequence_sum;
  static constexpr Traits traits{.reads_policy = true, .by_sign = true};
  static constexpr auto fields() {
    using W = SoftSequenceWeight;
    return std::tuple{
        field("k_pos", &W::k_pos, {0, 100}), field("lambda_pos", &W::lambda_pos, {1e-4, 100}),
        field("k_neg", &W::k_neg, {0, 100}), field("lambda_neg", &W::lambda_neg, {1e-4, 100})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.logp - token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number u = clamp(x, -1e30, 60), beyond = 1 - exp(u);
    const Number y = select(token.advantage < 0, u * k_neg + beyond * lambda_neg,
                            u * k_pos + beyond * lambda_pos);
    return exp_or_zero(min(y, 60.0));
  }
};

}  // namespace tether
