#pragma once

#include <tuple>

#include "../../core/options.h"
#include "row_scan.h"

namespace tether {

// Generalized advantage estimation.
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lambda A_{t+1},     return_t = A_t + V_t
//
// Schulman et al. 2015, arXiv:1506.02438, eq. 16. recursion.h says how rows end and what a masked
// gap does.
struct Gae {
  double gamma = 1;
  double lambda = 1;  // Schulman et al. 2017: 0.95
  MaskGap gap = MaskGap::carry;

  static constexpr Traits traits{.needs_values = true};
  static constexpr auto fields() {
    return std::tuple{field("gamma", &Gae::gamma, {0, 1}), field("lambda", &Gae::lambda, {0, 1})};
  }
  static constexpr auto choices() { return std::tuple{choice("gap", &Gae::gap, kMaskGapNames)}; }

  template <class Number>
  TETHER_FORMULA Step<Number> step(const RecursionToken<Number>& token) const {
    return {token.reward - token.value, Number{gamma}, gamma * token.lambda};
  }
};

template <class Array>
using GaeInputs = AdvantageInputs<Array>;
using GaeArrays = AdvantageArrays;

// Recursions are in double; the same bits for every executor.
inline void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                             const MutableArray& advantages,
                                             const MutableArray& returns,
                                             const Executor& executor = {}) {
  scan_rows("generalized_advantage_estimation", batch, options, advantages, returns, executor);
}

}  // namespace tether
