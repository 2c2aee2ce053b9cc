#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../token_weight.h"
#include "mismatch.h"

namespace tether {

// The trust region of DPPO, by what a token adds to the total variation between policies: the
// gradient of a token stops where it has moved its probability too far already.
//
//   W = 1 where x <= high (A > 0) or x >= -low (A <= 0), else 0
//   x = e^logp - e^old_logp
//
// Unlike a bound of the ratio it lets rare tokens move, and holds the frequent ones.
// DPPO: arXiv:2602.04879, eq. 12 and 13. `low` and `high` are of probabilities.
struct TvMask {
  double low = 0.2;
  double high = 0.2;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("low", &TvMask::low, {0, largest_option}),
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

// The same by the KL divergence between the two policies as each sees this token or another one.
//
//   W = 1 where x <= high or logp <= old_logp (A > 0), or x <= low or logp >= old_logp (A <= 0)
//   x = KL(Bernoulli(e^old_logp) || Bernoulli(e^logp))                                       [nats]
//
// and else 0.
// DPPO-KL: arXiv:2602.04879, eq. 12 and 14.
struct KlMask {
  double low = 0.05;
  double high = 0.05;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() {
    return std::tuple{field("low", &KlMask::low, {0, infinity}),
                      field("high", &KlMask::high, {0, infinity})};
  }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return bernoulli_kl(token.old_logp, token.logp);
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    const Number one = 0 * x + 1;
    const Number of_good = select(token.logp > token.old_logp, one_up_to(x, high), one);
    const Number of_bad = select(token.logp < token.old_logp, one_up_to(x, low), one);
    return select(token.advantage > 0, of_good, of_bad);
  }
};

// The total variation of both signs: a token that comes back is stopped too.
//
//   W = 1 where |e^logp - e^old_logp| <= high, else 0
//
// prime-rl's "ipo": of the linear surrogate.
struct TvBand {
  double high = 0.1;

  static constexpr Traits traits{.reads_policy = true};
  static constexpr auto fields() { return bound_from_above<TvBand>(); }

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return abs(exp(token.logp) - exp(token.old_logp));
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return one_up_to(x, high);
  }
};

}  // namespace tether
