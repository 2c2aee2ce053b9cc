#include "rl/policy/gpg.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Gpg, IsTheMeanOfMinusALogpOverTokens) {
  Batch<double> batch = two_answers();
  const double first = batch.logps[0] + batch.logps[1] + batch.logps[2];
  expect_loss_and_slopes(batch, presets::gpg(), (-2 * first + 2 * batch.logps[3]) / 4,
                         {-0.5, -0.5, -0.5, 0.5, 0, 0});
}

}  // namespace
}  // namespace tether
