#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"

namespace tether {

// What an f-divergence in place of KL(policy || reference) makes of a score. Wang et al. 2023,
// arXiv:2309.16240, table 1.

// g(S) = S: DPO.
struct ReverseKl {
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    return score;
  }
};

// g(S) = -e^-S, saturated at |S| = 40, where peers overflow: its square stays a float, and the
// derivative is the one there, not 0.
struct ForwardKl {
  static constexpr Traits traits{.pulls_back = false};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    return -exp(with_gradient_of(clamp(-score, -40, 40), -score));
  }
};

// g(S) = log sigmoid(S).
struct JensenShannon {
  static constexpr Traits traits{.pulls_back = false};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    return log_sigmoid(score);
  }
};

}  // namespace tether
