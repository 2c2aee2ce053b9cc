#include "rl/policy/luspo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// The first answer's ratio is the cube root of 0.825, inside of a wide clip; of the second 0.5.
TEST(Luspo, CountsAnswersByTheirLength) {
  Batch<double> batch = two_answers();
  const double s = std::cbrt(0.825);
  expect_loss_and_slopes(batch, presets::luspo({.epsilon_low = 0.6, .epsilon_high = 0.5}),
                         (3 * -2 * s + 1.0) / 2, {-s, -s, -s, 0.5, 0, 0});
}

}  // namespace
}  // namespace tether
