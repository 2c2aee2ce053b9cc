#include "rl/preference/log_odds.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/preference/dpo.h"
#include "tests/error_message.h"
#include "tests/rl/preference_batch.h"

namespace tether {
namespace {

Dual<double> at(double score) { return LogOdds{}(Dual<double>{score, 1}); }

TEST(LogOdds, MatchesThePaperByHand) {
  // p = 1/2: odds of 1, slope 1 / (1 - p). p = 1/4: odds of 1/3.
  EXPECT_NEAR(at(-std::log(2)).value, 0, 1e-16);
  EXPECT_DOUBLE_EQ(at(-std::log(2)).grad, 2);
  EXPECT_DOUBLE_EQ(at(-std::log(4)).value, -std::log(3));
  EXPECT_DOUBLE_EQ(at(-std::log(4)).grad, 4.0 / 3);
}

// Near a certain answer 1 - p is -S, which e^S has rounded away.
TEST(LogOdds, KeepsItsDigitsWherePeersLoseThem) {
  for (const double score : {-1e-6, -1e-7}) {
    EXPECT_NEAR(at(score).value, score / 2 - std::log(-score), 1e-13) << score;
    EXPECT_NEAR(at(score).grad, 0.5 - 1 / score, 1e-6) << score;
  }
}

TEST(LogOdds, IsFiniteForACertainAnswerAndForAnImpossibleOne) {
  EXPECT_NEAR(at(0).value, 24 * std::log(2), 1e-7);
  EXPECT_NEAR(at(0).grad, 0x1p24, 1);
  EXPECT_EQ(at(3).value, at(0).value);
  EXPECT_DOUBLE_EQ(at(-1e300).value, -1e300);
  EXPECT_DOUBLE_EQ(at(-1e300).grad, 1);
}

TEST(LogOdds, TakesLogProbabilitiesAlone) {
  PairRows<double> batch(1, 2);
  PreferenceObjective objective = presets::dpo();
  objective.link = LogOdds{};
  EXPECT_EQ(message([&] { batch.run(objective); }),
            "preference_loss: reference must be false with this link, got true. It takes "
            "log-probabilities, not log-ratios");
  objective.reference = false;
  batch.mask = {1, 1, 1, 1};
  batch.logps = {-1, -2, 1, -0.75};
  EXPECT_EQ(message([&] { batch.run(objective); }),
            "preference_loss: logps must be log-probabilities with this link, at most 0, got a sum "
            "of 0.25 at [1]");
}

TEST(LogOdds, IsALinkByName) {
  Link link = ReverseKl{};
  choose(link, chosen(Link(LogOdds{})));
  EXPECT_NE(link.target<LogOdds>(), nullptr);
}

}  // namespace
}  // namespace tether
