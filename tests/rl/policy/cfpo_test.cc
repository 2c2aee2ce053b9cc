#include "rl/policy/cfpo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

struct Row {
  double ratio, advantage, value, grad;
};

void expect(const QuadraticBound& bound, const Row& row, double logp) {
  const auto loss = bound(token_at(row.ratio, row.advantage, logp));
  EXPECT_NEAR(loss.value, row.value, 1e-15) << "ratio " << row.ratio << ", A " << row.advantage;
  EXPECT_NEAR(loss.grad, row.grad, 2e-15) << "ratio " << row.ratio << ", A " << row.advantage;
}

// With epsilon 1/2 the square is |A| (ratio - 1)^2, the slope -ratio A (1 - 2 sign(A) (ratio - 1)).
TEST(QuadraticBound, RestsAtEpsilonAndTurnsBackBeyond) {
  for (const Row& row : {Row{1, 2, -2, -2}, Row{1.5, 2, -2.5, 0}, Row{2, 2, -2, 4},
                         Row{0.5, 2, -0.5, -2}, Row{1, -2, 2, 2}, Row{0.5, -2, 1.5, 0},
                         Row{0.25, -2, 1.625, -0.25}, Row{1.5, -2, 3.5, 6}, Row{3, 0, 0, 0}}) {
    for (const double logp : {-1.0, -9.0}) expect({.epsilon = 0.5}, row, logp);
  }
}

// An old probability of 1/4: at ratio 1.5 it has moved by 1/8.
TEST(QuadraticBound, OfTheProbabilityRestsWhereThatHasMovedByEpsilon) {
  for (const Row& row : {Row{1.5, 2, -2.5, 0}, Row{2, 2, -2, 4}, Row{0.5, -2, 1.5, 0}}) {
    expect({.epsilon = 0.125, .power = 1}, row, std::log(row.ratio / 4));
  }
  // Of 1/16 it has moved by 1/32: a quarter of the way.
  expect({.epsilon = 0.125, .power = 1}, {1.5, 2, -2.875, -2.25}, std::log(1.5 / 16));
  // The root of 1/16 counts as 1/4.
  expect({.epsilon = 0.125, .power = 0.5}, {1.5, 2, -2.5, 0}, std::log(1.5 / 16));
}

TEST(QuadraticBound, HasNoNanAtAnyRatio) {
  for (const double ratio : {1e-200, 1e200}) {
    for (const double advantage : {-1e40, 0.0, 1e40}) {
      const auto loss = QuadraticBound{.epsilon = 1e-6, .power = 1}(token_at(ratio, advantage));
      EXPECT_FALSE(std::isnan(loss.value) || std::isnan(loss.grad)) << ratio << " " << advantage;
    }
  }
}

TEST(QuadraticBound, DefaultsAreThePapers) {
  EXPECT_EQ(QuadraticBound{}.epsilon, 0.2);
  EXPECT_EQ(QuadraticBound{}.power, 0);
  EXPECT_EQ(presets::drpo().surrogate.target<QuadraticBound>()->epsilon, 12.5);
  EXPECT_EQ(presets::drpo().surrogate.target<QuadraticBound>()->power, 1);
}

double loss_of(double ratio, double A, double over) {
  return std::abs(A) * (ratio - 1) * (ratio - 1) * over - ratio * A;
}
double slope_of(double ratio, double A, double over) {
  return ratio * (2 * std::abs(A) * (ratio - 1) * over - A);
}

// Each answer's mean, then theirs: the factors are 1/6 and 1/2.
TEST(Cfpo, IsTheMeanOverAnswers) {
  Batch<double> batch = two_answers();
  const double over = 1 / 0.5;  // 1 / (2 epsilon)
  const auto loss = [&](double ratio, double A) { return loss_of(ratio, A, over); };
  const auto slope = [&](double ratio, double A) { return slope_of(ratio, A, over); };
  const double first = (loss(1.1, 2) + loss(1.5, 2) + loss(0.5, 2)) / 3;
  expect_loss_and_slopes(
      batch, presets::cfpo(0.25), (first + loss(0.5, -2)) / 2,
      {slope(1.1, 2) / 6, slope(1.5, 2) / 6, slope(0.5, 2) / 6, slope(0.5, -2) / 2, 0, 0});
}

// The mean over four tokens, each of the old probability e^-1.
TEST(Drpo, IsTheMeanOverTokens) {
  Batch<double> batch = two_answers();
  const double over = std::exp(-1.0) / 0.5;
  const auto loss = [&](double ratio, double A) { return loss_of(ratio, A, over); };
  const auto slope = [&](double ratio, double A) { return slope_of(ratio, A, over); };
  expect_loss_and_slopes(
      batch, presets::drpo(0.25), (loss(1.1, 2) + loss(1.5, 2) + loss(0.5, 2) + loss(0.5, -2)) / 4,
      {slope(1.1, 2) / 4, slope(1.5, 2) / 4, slope(0.5, 2) / 4, slope(0.5, -2) / 4, 0, 0});
}

// Two tokens of probability 1/2 and 1/8 whose mean ratio is 2: their old probabilities count as
// 1/4 and 1/16, though the policies' own were 1/8 (ratio 4) and 1/8 (ratio 1).
TEST(Drpo, TheOldProbabilityIsWhatTheRatioOfAnAnswerTellsOf) {
  Batch<double> batch(1, 2);
  batch.mask = {1, 1};
  batch.advantages = {3, 3};
  batch.logps = {std::log(0.5), std::log(0.125)};
  batch.old_logps = {std::log(0.125), std::log(0.125)};
  PolicyObjective objective = presets::drpo(0.25);
  objective.level = RatioLevel::sequence_token;
  const auto loss = [](double w) { return loss_of(2, 3, w / 0.5); };
  const auto slope = [](double w) { return slope_of(2, 3, w / 0.5); };
  expect_loss_and_slopes(batch, objective, (loss(0.25) + loss(0.0625)) / 2,
                         {slope(0.25) / 2, slope(0.0625) / 2});
}

}  // namespace
}  // namespace tether
