#include "rl/policy/band.h"

#include <gtest/gtest.h>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

TEST(Band, HasNoGradientOutsideOnEitherSide) {
  const BandClip clip{.epsilon_low = 0.25, .epsilon_high = 0.5};
  EXPECT_DOUBLE_EQ(clip(token_at(2, 1)).value, -1.5);
  EXPECT_EQ(clip(token_at(2, 1)).grad, 0);
  EXPECT_DOUBLE_EQ(clip(token_at(0.5, 1)).value, -0.75);
  EXPECT_EQ(clip(token_at(0.5, 1)).grad, 0);
  EXPECT_DOUBLE_EQ(clip(token_at(1.25, 2)).grad, -2.5);
}

TEST(Band, CountsWhatIsOutside) {
  Batch<double> batch = two_answers();
  expect_loss_and_slopes(batch, presets::band(), (-2.2 - 2.4 - 1.6 + 1.6) / 4,
                         {-2.2 / 4, 0, 0, 0, 0, 0});
  const auto metrics = batch.run(presets::band()).metrics.to_map();
  EXPECT_EQ(metrics.at("clip_fraction_low"), 0.5);
  EXPECT_EQ(metrics.at("clip_fraction_high"), 0.25);
}

}  // namespace
}  // namespace tether
