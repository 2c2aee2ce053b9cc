#include "rl/preference_objective.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "rl/catalogue.h"
#include "tests/error_message.h"
#include "tests/rl/catalogue_names.h"

namespace tether {
namespace {

TEST(PreferenceObjective, ListsItsOptionsByName) {
  std::map<std::string, double> options;
  const PreferenceObjective objective = presets::cdpo(0.3, 0.2);
  for_each_option(objective, [&](std::string_view name, double value, const Range&) {
    options[std::string(name)] = value;
  });
  EXPECT_EQ(options, (std::map<std::string, double>{{"label_smoothing", 0.2},
                                                    {"beta", 0.3},
                                                    {"loss_weight", 1},
                                                    {"nll_coef", 0},
                                                    {"ld_alpha", 1}}));
}

TEST(PreferenceObjective, OptionsAndChoicesAreSetByName) {
  PreferenceObjective objective = presets::dpo();
  set_option("f", objective, "beta", 0.4);
  set_option("f", objective, "label_smoothing", 0.3);
  set_choice("f", objective, "score", "mean");
  set_choice("f", objective, "reference", "false");
  set_choice("f", objective, "link", "js");
  EXPECT_EQ(objective.beta, 0.4);
  EXPECT_EQ(objective.loss.target<LogisticPair>()->label_smoothing, 0.3);
  EXPECT_EQ(objective.score, PairScore::mean);
  EXPECT_FALSE(objective.reference);
  EXPECT_NE(objective.link.target<JensenShannon>(), nullptr);
}

TEST(PreferenceObjective, BadOptionsGetOneClearError) {
  PreferenceObjective objective = presets::dpo();
  std::string links;
  for (const std::string_view each : kLinkNames) detail::append(links, each);
  EXPECT_EQ(message([&] { set_choice("f", objective, "link", "jss"); }),
            "f: link must be one of " + links + ", got \"jss\"");
  EXPECT_EQ(message([&] { check_objective("f", presets::dpo(0)); }),
            "f: beta must be in (0, 1e+12], got 0");
  EXPECT_EQ(message([&] { preference_preset("f", "dop"); }),
            "f: objective must be one of " + names_of(kPreferenceCatalogue) + ", got \"dop\"");
}

// Value and slope of g at a score of log 2 and of -log 2: sigmoid(log 2) = 2/3.
TEST(Link, MatchesTheTableByHand) {
  const double s = std::log(2);
  const auto at = [](auto link, double score) { return link(Dual<double>{score, 1}); };
  EXPECT_EQ(at(ReverseKl{}, s).value, s);
  EXPECT_EQ(at(ReverseKl{}, s).grad, 1);
  EXPECT_DOUBLE_EQ(at(ForwardKl{}, s).value, -0.5);
  EXPECT_DOUBLE_EQ(at(ForwardKl{}, s).grad, 0.5);
  EXPECT_DOUBLE_EQ(at(ForwardKl{}, -s).value, -2);
  EXPECT_DOUBLE_EQ(at(ForwardKl{}, -s).grad, 2);
  EXPECT_DOUBLE_EQ(at(JensenShannon{}, s).value, std::log(2.0 / 3));
  EXPECT_DOUBLE_EQ(at(JensenShannon{}, s).grad, 1.0 / 3);
  EXPECT_DOUBLE_EQ(at(JensenShannon{}, -s).value, std::log(1.0 / 3));
  EXPECT_DOUBLE_EQ(at(JensenShannon{}, -s).grad, 2.0 / 3);
}

TEST(Link, ForwardKlSaturatesWithTheSlopeThatItHasThere) {
  const auto saturated = ForwardKl{}(Dual<double>{-1e6, 1});
  EXPECT_DOUBLE_EQ(saturated.value, -std::exp(40));
  EXPECT_DOUBLE_EQ(saturated.grad, std::exp(40));
}

}  // namespace
}  // namespace tether
