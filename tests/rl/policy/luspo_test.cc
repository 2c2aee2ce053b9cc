#include "rl/policy/luspo.h"

#include <gtest/gtest.h>

#include <algorithm>
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

// The sums of a million tokens, each as large as a float can be.
TEST(Luspo, ALongAnswerThatRanAwayIsFinite) {
  for (const float size : {61.0f, 1e18f, 3e38f}) {
    Batch<float> batch(2, 1000000);
    batch.mask.assign(2000000, 1);
    batch.logps.assign(2000000, -1);
    batch.old_logps.assign(2000000, -size);
    batch.advantages.assign(2000000, 1e30f);
    std::fill_n(batch.advantages.begin(), 1000000, -1e30f);
    const PolicyTotals out = batch.run(presets::luspo());
    EXPECT_TRUE(std::isfinite(out.loss) && out.loss > 0) << size;
    bool finite = true;
    for (const float each : batch.dlogps) finite &= std::isfinite(each);
    EXPECT_TRUE(finite) << size;
    EXPECT_GT(batch.dlogps[0], 0);  // pulled back
  }
}

}  // namespace
}  // namespace tether
