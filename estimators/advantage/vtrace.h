#pragma once

#include <tuple>

#include "../../core/options.h"
#include "recursion.h"

namespace tether {

// V-trace: advantages of tokens that another policy mu sampled.
//
//   rho_t = min(rho_bar, e^u),   c_t = lambda min(c_bar, e^u),   u = log pi(token) - log mu(token)
//   v_t   = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (v_{t+1} - V_{t+1})
//   A_t   = min(pg_rho_bar, e^u) (r_t + gamma q_{t+1} - V_t),   q = V + lambda (v - V)
//
// and return_t = v_t. Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2, where q is v:
// with lambda below 1 it is rlax's. rho_bar says which policy the values are of, c_bar how far
// corrections reach. Where pi is mu and the bars are at least 1, A and v are those of GAE.
// recursion.h says how rows end and what a masked gap does.
//
// A has weights in it already: with it belongs a loss without a ratio (reinforce). torchrl has no
// lambda, and rho_bar for pg_rho_bar; rlax has c_bar 1.
struct Vtrace {
  double gamma = 1;
  double lambda = 1;
  double rho_bar = 1;
  double c_bar = 1;
  double pg_rho_bar = 1;
  MaskGap gap = MaskGap::carry;

  static constexpr Traits traits{.needs_values = true, .needs_log_ratios = true};
  static constexpr auto fields() {
    return std::tuple{field("gamma", &Vtrace::gamma, {0, 1}),
                      field("lambda", &Vtrace::lambda, {0, 1}),
                      field("rho_bar", &Vtrace::rho_bar, {0, infinity}),
                      field("c_bar", &Vtrace::c_bar, {0, infinity}),
                      field("pg_rho_bar", &Vtrace::pg_rho_bar, {0, infinity})};
  }
  static constexpr auto choices() { return std::tuple{choice("gap", &Vtrace::gap, kMaskGapNames)}; }

  template <class Number>
  TETHER_FORMULA Step<Number> step(const RecursionToken<Number>& token) const {
    const Number rho = min(exp(token.log_ratio), rho_bar), c = min(exp(token.log_ratio), c_bar);
    return {rho * (token.reward - token.value), gamma * rho, gamma * token.lambda * c};
  }
  template <class Number>
  TETHER_FORMULA Step<Number> advantage(const RecursionToken<Number>& token) const {
    const Number rho = min(exp(token.log_ratio), pg_rho_bar);
    return {rho * (token.reward - token.value), gamma * rho, gamma * token.lambda * rho};
  }
};

}  // namespace tether
