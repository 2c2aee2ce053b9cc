#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"

namespace tether {

// The reward of AlphaPO, which bends the logarithm: of a mean log-probability S,
//
//   g(S) = (1 - e^(-alpha S)) / alpha = -expm1(-alpha S) / alpha,   its limit S at alpha 0
//
// d g / d S = e^(-alpha S). Gupta et al. 2025, arXiv:2501.03884, with the score of SimPO: the mean
// of logp without a reference. alpha S saturates at 40 as in the link of the forward KL, and the
// derivative is the one there, not 0. TRL takes the power of e^S, which is infinite from
// S = -104 on.
struct AlphaPo {
  double alpha = 0.25;  // the paper's; below 0 it bends the other way

  static constexpr Traits traits{.pulls_back = false};
  static constexpr auto fields() {
    return std::tuple{field("alpha", &AlphaPo::alpha, {-100, 100})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    if (alpha < kStraight && alpha > -kStraight) return score;
    const Number bent = score * -alpha;
    return expm1(with_gradient_of(clamp(bent, -40, 40), bent)) / -alpha;
  }

 private:
  static constexpr double kStraight = 1e-150;  // alpha S, which would vanish, bends nothing
};

}  // namespace tether
