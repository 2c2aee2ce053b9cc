#include "rl/policy/kl_cov.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// The tokens of token_at.h: -ratio A is -2.2, -3, -1 and 1, over 4. Of the two that are penalised
// one has come up, log 1.5, and one has gone down, -log 2.
TEST(KlCov, PenalisesTheDistanceOfThePickedTokensAlone) {
  Batch<double> batch = two_answers();
  batch.kl_weights = {0, 1, 1, 0, 0, 0};
  expect_loss_and_slopes(batch, presets::kl_cov(0.5),
                         (-2.2 - 3 - 1 + 1 + 0.5 * (std::log(1.5) + std::log(2))) / 4,
                         {-2.2 / 4, (-3 + 0.5) / 4, (-1 - 0.5) / 4, 1.0 / 4, 0, 0});
}

// Of the tie the first update is plain policy gradient.
TEST(KlCov, HasNoPenaltyWhereNothingMoved) {
  Batch<double> batch = two_answers();
  batch.old_logps = batch.logps;
  batch.kl_weights = {1, 1, 1, 1, 1, 1};
  expect_loss_and_slopes(batch, presets::kl_cov(), (-2 - 2 - 2 + 2.0) / 4,
                         {-2.0 / 4, -2.0 / 4, -2.0 / 4, 2.0 / 4, 0, 0});
}

}  // namespace
}  // namespace tether
