#include "rl/policy/vespo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// The ratios of the answers are 0.825 and 0.5.
TEST(Vespo, WeighsTokensByTheirAnswer) {
  Batch<double> batch = two_answers();
  const double good = 0.825 * 0.825 * std::exp(3 * 0.175), bad = 0.125 * std::exp(2 * 0.5);
  const double first = batch.logps[0] + batch.logps[1] + batch.logps[2];
  expect_loss_and_slopes(batch, presets::vespo(),
                         (-2 * good * first + 2 * bad * batch.logps[3]) / 4,
                         {-good / 2, -good / 2, -good / 2, bad / 2, 0, 0});
}

}  // namespace
}  // namespace tether
