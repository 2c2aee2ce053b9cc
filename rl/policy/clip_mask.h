#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// PPO's clip as a mask: the tokens that it leaves a gradient.
//
//   W = 0 where A > 0 and ratio > 1 + epsilon_high, or A < 0 and ratio < 1 - epsilon_low, else 1
//
// Of REINFORCE: REC-OneSide-NoIS, arXiv:2509.24203. Of the importance-weighted surrogate: the
// gradient of PPO.
struct ClipMask {
  double epsilon_low = 0.2;
  double epsilon_high = 0.2;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("epsilon_low", &ClipMask::epsilon_low, {0, 1}),
                      field("epsilon_high", &ClipMask::epsilon_high, {0, infinity})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.logp - token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number ratio = exp(x), none = 0 * x, one = none + 1;
    const Number of_good = select(ratio > 1 + epsilon_high, none, one);
    const Number of_bad = select(ratio < 1 - epsilon_low, none, one);
    return select(token.advantage > 0, of_good, select(token.advantage < 0, of_bad, one));
  }
};

// The tokens near the old policy, and those so far on the wrong side that they are to come back.
//
//   W = 1 where 1 - epsilon_low <= ratio <= 1 + epsilon_high,
//         or A > 0 and ratio <= 1 - far_low, or A < 0 and ratio >= 1 + far_high, else 0
//
// REC-Ring-NoIS, arXiv:2509.24203. With far_low 1 and far_high infinity none come back:
// REC-TwoSide.
struct RingMask {
  double epsilon_low = 0.2, epsilon_high = 0.2;
  double far_low = 0.4, far_high = 0.4;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("epsilon_low", &RingMask::epsilon_low, {0, 1}),
                      field("epsilon_high", &RingMask::epsilon_high, {0, infinity}),
                      field("far_low", &RingMask::far_low, {0, 1}),
                      field("far_high", &RingMask::far_high, {0, infinity})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.logp - token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number ratio = exp(x), none = 0 * x, one = none + 1;
    const Number of_good = select(ratio > 1 - far_low, none, one);
    const Number of_bad = select(ratio < 1 + far_high, none, one);
    const Number beyond =
        select(token.advantage > 0, of_good, select(token.advantage < 0, of_bad, none));
    return within(ratio, 1 - epsilon_low, 1 + epsilon_high, one, beyond);
  }
};

}  // namespace tether
