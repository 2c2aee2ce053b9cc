#include "rl/policy/dppo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// The probabilities of token_at.h moved by +0.0368, +0.1839, -0.1839 and -0.1839.
TEST(Dppo, StopsTokensByTotalVariation) {
  Batch<double> batch = two_answers();
  const double first = std::log(1.1) - 1, third = std::log(0.5) - 1;
  expect_loss_and_slopes(batch, presets::dppo_tv({.low = 0.1, .high = 0.1}, 1.05),
                         (-1.05 * 2 * first - 0.5 * 2 * third) / 4,
                         {-1.05 * 2 / 4, 0, -0.5 * 2 / 4, 0, 0, 0});
}

// KL of the second token: 0.3679 log(1/1.5) + 0.6321 log(0.6321 / 0.4482) = 0.0682, of the last:
// 0.3679 log 2 + 0.6321 log(0.6321 / 0.8161) = 0.0935.
TEST(Dppo, StopsTokensByKl) {
  Batch<double> batch = two_answers();
  const double first = std::log(1.1) - 1, second = std::log(1.5) - 1, third = std::log(0.5) - 1;
  expect_loss_and_slopes(batch, presets::dppo_kl({.low = 0.09, .high = 0.06}),
                         (-1.1 * 2 * first - 0.5 * 2 * third) / 4,
                         {-1.1 * 2 / 4, 0, -0.5 * 2 / 4, 0, 0, 0});
  expect_loss_and_slopes(
      batch, presets::dppo_kl({.low = 0.1, .high = 0.07}),
      (-1.1 * 2 * first - 1.5 * 2 * second - 0.5 * 2 * third + 0.5 * 2 * third) / 4,
      {-1.1 * 2 / 4, -1.5 * 2 / 4, -0.5 * 2 / 4, 0.5 * 2 / 4, 0, 0});
}

}  // namespace
}  // namespace tether
