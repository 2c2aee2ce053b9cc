#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../policy_objective.h"
#include "../token.h"

namespace tether {

// The log-ratio as a prediction of the advantage.
//
//   loss = (scale u - eta A)^2,   d loss / d logp = 2 scale (scale u - eta A)
//   u    = logp - old_logp                                                                   [nats]
//
// Its minimum is at the ratio e^(eta A / scale).
struct SquaredRegression {
  double scale = 1;
  double eta = 1;

  static constexpr Traits traits{.homogeneous = false};
  static constexpr auto fields() {
    return std::tuple{field("scale", &SquaredRegression::scale, {0, largest_option}),
                      field("eta", &SquaredRegression::eta, {0, largest_option})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const Number error = token.log_ratio * scale - token.advantage * eta;
    return error * error;
  }
};

namespace presets {

// SPPO on-line: u of whole answers, A their probability of winning minus 1/2. arXiv:2405.00675,
// eq. 4.6; verl's recipe has eta 1.
inline PolicyObjective sppo(double eta = 1) {
  return {.level = RatioLevel::sequence_sum,
          .surrogate = SquaredRegression{.scale = 1, .eta = eta},
          .aggregation = sequence_mean_token_mean()};
}

// A*-PO: the log-ratio to the reference, which takes the place of the old policy, predicts the
// advantage over the optimal value, A = R - V*. arXiv:2505.20686.
inline PolicyObjective a2po(double scale = 1e-3) {
  return {.level = RatioLevel::sequence_sum,
          .surrogate = SquaredRegression{.scale = scale, .eta = 1},
          .aggregation = sequence_mean_token_mean()};
}

}  // namespace presets
}  // namespace tether
