#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "rl/token.h"
#include "tests/rl/policy_batch.h"

namespace tether {

// A token of this ratio, whose derivative is by its own log-probability.
inline Token<Dual<double>, Constant<double>> token_at(double ratio, double advantage,
                                                      double logp = -1) {
  const Dual<double> log_ratio{std::log(ratio), 1};
  return {{logp, 1}, log_ratio, exp(log_ratio), {advantage}, {logp - log_ratio.value}, {logp}};
}

// Two answers of three tokens and of one, each with its ratios and its advantage:
//
//   row 0   ratios 1.1, 1.5, 0.5   A = +2
//   row 1   ratio  0.5             A = -2
//
// Clipped to [0.8, 1.2] the tokens' losses and slopes are
//
//   -min(ratio A, clip(ratio) A)   -2.2  -2.4  -1.0    +1.6
//   by logp                        -2.2   0    -1.0     0
inline Batch<double> two_answers() {
  Batch<double> batch(2, 3);
  batch.mask = {1, 1, 1, 1, 0, 0};
  batch.old_logps.assign(6, -1);
  batch.logps = {
      -1 + std::log(1.1), -1 + std::log(1.5), -1 + std::log(0.5), -1 + std::log(0.5), -1, -1};
  batch.ref_logps = batch.logps;
  batch.advantages = {2, 2, 2, -2, 0, 0};
  return batch;
}

inline void expect_loss_and_slopes(Batch<double>& batch, const PolicyObjective& objective,
                                   double loss, const std::vector<double>& slopes) {
  EXPECT_NEAR(batch.run(objective).loss, loss, 1e-15);
  for (size_t i = 0; i < slopes.size(); ++i) {
    if (slopes[i] == 0) {
      EXPECT_EQ(batch.dlogps[i], 0) << i;
    } else {
      EXPECT_NEAR(batch.dlogps[i], slopes[i], 1e-15) << i;
    }
  }
}

}  // namespace tether
