#pragma once

#include "../../core/formula.h"
#include "../../core/number.h"

namespace tether {

// The log-odds of an answer whose score S is a mean log-probability, of p = e^S:
//
//   g(S) = log(p / (1 - p)) = S - log(1 - e^S)
//
// d g / d S = 1 / (1 - e^S). Hong et al. 2024, arXiv:2403.07691, eq. 4. Where 1 - p is below 2^-24,
// of which a float32 knows nothing, it counts as that, with the derivative there: log-odds of a
// certain answer, S = 0, are infinite, and peers have NaN from S = -3e-8 on.
struct LogOdds {
  static constexpr Traits traits{.of_log_ratio = false};

  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    const Number below_0 = with_gradient_of(min(score, kLargest), score);
    return below_0 - log1mexp(below_0);
  }

 private:
  static constexpr double kLargest = -0x1p-24;
};

}  // namespace tether
