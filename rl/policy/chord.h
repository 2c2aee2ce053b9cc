#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// What a token of an expert still teaches: little where the policy knows it, or cannot know it.
//
//   W = p (1 - p),   p = e^logp
//
// CHORD, the weight phi of its supervised term, arXiv:2508.11408: REINFORCE with advantages of 1 on
// the expert's answers, added to the objective of the policy's own by a second call.
struct Uncertainty {
  static constexpr Traits traits{.reads_policy = true};

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return min(token.logp, 0.0);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    const auto p = chances(x);
    return select(x < -double(kSaturation<float>), 0 * x, p.own * p.others);
  }
};

}  // namespace tether
