#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"

namespace tether {

// The trust region of DPPO, by what a token adds to the total variation between policies: the
// gradient of a token stops where it has moved its probability too far already.
//
//   W = 1 where x <= high (A > 0) or x >= -low (A <= 0), else 0
//   x = e^logp - e^old_logp
//
// Unlike a bound of the ratio it lets rare tokens move, and holds the frequent ones.
// DPPO: arXiv:2602.04879. `low` and `high` are of probabilities.
struct TvMask {
  double low = 0.2;
  double high = 0.2;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("low", &TvMask::low, {0, largest_finite}),
                      field("high", &TvMask::high, {0, infinity})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return exp(token.logp) - exp(token.old_logp);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number beyond = select(token.advantage > 0, x - high, -x - low);
    return select(beyond > 0, 0 * x, 0 * x + 1);
  }
};

}  // namespace tether
