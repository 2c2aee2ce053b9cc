#include "rl/policy/gspo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

constexpr PpoClip kWide{.epsilon_low = 0.2, .epsilon_high = 0.3};

// Answers whose tokens' ratios have the geometric mean `ratio`: of three tokens and of one.
Batch<double> answers(double first, double second, double A) {
  Batch<double> batch(2, 3);
  batch.mask = {1, 1, 1, 1, 0, 0};
  const double u = std::log(first);
  batch.logps = {u + 0.75, u - 0.25, u - 0.5, std::log(second), 0, 0};
  batch.advantages.assign(6, A);
  return batch;
}

// s = 1.1 and 1.5, A = 2: the losses -2.2 and -2.6 count once an answer. d s / d logp_t = s / 3.
TEST(Gspo, ClipsTheGeometricMeanOfAnAnswersRatios) {
  Batch<double> batch = answers(1.1, 1.5, 2);
  const double slope = -2.2 / 3 / 2;
  expect_loss_and_slopes(batch, presets::gspo(kWide), -2.4, {slope, slope, slope, 0, 0, 0});
}

// s = 1.5 and 0.5, A = -2: 3 is kept, 1.6 is clipped.
TEST(Gspo, ABadAnswerThatBecameTooLikelyIsPulledBack) {
  Batch<double> batch = answers(1.5, 0.5, -2);
  const double slope = 3.0 / 3 / 2;
  expect_loss_and_slopes(batch, presets::gspo(kWide), 2.3, {slope, slope, slope, 0, 0, 0});
}

// 1 + 3.5e-4 is within its bound of 4e-4, 1 - 3.5e-4 beyond its own of 3e-4.
TEST(Gspo, HasTheTightUnequalBoundsOfThePaper) {
  Batch<double> good = answers(1 + 3.5e-4, 1 + 4.5e-4, 1);
  const double slope = -(1 + 3.5e-4) / 6;
  expect_loss_and_slopes(good, presets::gspo(), -1 - 3.75e-4, {slope, slope, slope, 0, 0, 0});
  Batch<double> bad = answers(1 - 2.5e-4, 1 - 3.5e-4, -1);
  const double back = (1 - 2.5e-4) / 6;
  expect_loss_and_slopes(bad, presets::gspo(), 1 - 2.75e-4, {back, back, back, 0, 0, 0});
}

// s = 1.1 for all tokens of the first answer, each with its own A: losses -2.2, 1.1, -1.1 over 3.
// The gradient -s A_t / 3 / 2 is the token's own. The other answer: -2.6, clipped.
TEST(GspoToken, HasTheRatioOfTheAnswerAndTheGradientOfEachTokensAdvantage) {
  Batch<double> batch = answers(1.1, 1.5, 2);
  batch.advantages = {2, -1, 1, 2, 0, 0};
  expect_loss_and_slopes(batch, presets::gspo_token(kWide), (-2.2 / 3 - 2.6) / 2,
                         {-2.2 / 6, 1.1 / 6, -1.1 / 6, 0, 0, 0});
}

TEST(GspoToken, WithOneAdvantageAnAnswerItIsGspo) {
  Batch<double> batch = answers(1 + 3.5e-4, 1 - 2.5e-4, 1);
  const double loss = batch.run(presets::gspo()).loss;
  const std::vector<double> slopes = batch.dlogps;
  expect_loss_and_slopes(batch, presets::gspo_token(), loss, slopes);
}

}  // namespace
}  // namespace tether
