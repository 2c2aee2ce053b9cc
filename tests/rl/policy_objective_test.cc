#include "rl/policy_objective.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "rl/catalogue.h"
#include "tests/error_message.h"
#include "tests/rl/catalogue_names.h"

namespace tether {
namespace {

std::map<std::string, double> options_of(const PolicyObjective& objective) {
  std::map<std::string, double> out;
  for_each_option(objective, [&](std::string_view name, double value, const Range&) {
    out[std::string(name)] = value;
  });
  return out;
}

TEST(PolicyObjective, ListsItsOptionsByName) {
  EXPECT_EQ(options_of(presets::dapo()),
            (std::map<std::string, double>{{"epsilon_low", 0.2},
                                           {"epsilon_high", 0.28},
                                           {"dual_clip", infinity},
                                           {"log_ratio_low", infinity},
                                           {"log_ratio_high", infinity},
                                           {"beta", 0},
                                           {"kl_ratio_high", infinity},
                                           {"entropy_coef", 0},
                                           {"constant", 1}}));
}

TEST(PolicyObjective, OptionsAreSetByName) {
  PolicyObjective objective = presets::grpo();
  set_option("policy_loss", objective, "epsilon_high", 0.4);
  set_option("policy_loss", objective, "beta", 0.1);
  EXPECT_EQ(objective.surrogate.target<PpoClip>()->epsilon_high, 0.4);
  EXPECT_EQ(objective.kl.beta, 0.1);
}

TEST(PolicyObjective, BadOptionsGetOneClearError) {
  PolicyObjective objective = presets::ppo();
  EXPECT_EQ(message([&] { set_option("policy_loss", objective, "epsilon", 0.2); }),
            "policy_loss: option must be one of epsilon_low, epsilon_high, dual_clip, "
            "log_ratio_low, log_ratio_high, beta, kl_ratio_high, entropy_coef, "
            "constant, got \"epsilon\"");
  EXPECT_EQ(message([&] { set_option("policy_loss", objective, "epsilon_low", 1.2); }),
            "policy_loss: epsilon_low must be in [0, 1], got 1.2");
  EXPECT_EQ(message([&] { check_objective("f", presets::ppo({.dual_clip = 1})); }),
            "f: dual_clip must be greater than 1, got 1");
  EXPECT_EQ(message([&] { check_objective("f", presets::grpo(NAN)); }),
            "f: beta must be in [0, 1e+12], got nan");
  EXPECT_EQ(message([&] { preset("policy_loss", "gropo"); }),
            "policy_loss: objective must be one of " + names_of(kCatalogue) + ", got \"gropo\"");
}

struct Quadratic {
  double strength = 3;
  static constexpr auto fields() {
    return std::tuple{field("strength", &Quadratic::strength, {0, 10})};
  }
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.log_ratio * token.log_ratio * strength - token.advantage * token.logp +
           token.old_logp * 100.0 + token.ref_logp * 1000.0;
  }
};

TEST(Surrogate, TakesAUsersOwnFormula) {
  PolicyObjective objective = presets::grpo();
  objective.surrogate = Quadratic{};
  set_option("f", objective, "strength", 2);
  double logp[16] = {-1}, log_ratio[16] = {0.5}, ratio[16] = {std::exp(0.5)}, advantage[16] = {4},
         old_logp[16] = {-1.5};
  double ref_logp[16] = {-2}, value[16], dlogp[16];
  objective.surrogate(
      TokenColumns<double>{logp, log_ratio, ratio, advantage, old_logp, ref_logp, 16}, value,
      dlogp);
  EXPECT_DOUBLE_EQ(value[0], 0.5 + 4 - 150 - 2000);
  EXPECT_DOUBLE_EQ(dlogp[0], 2 - 4);
  EXPECT_EQ(objective.surrogate.target<PpoClip>(), nullptr);
}

TEST(Surrogate, TraitsAreThoseThatTheFormulaStates) {
  EXPECT_TRUE(Surrogate(PpoClip{}).traits().clips);
  EXPECT_TRUE(Surrogate(IsReinforce{}).traits().stops_gradient);
  EXPECT_FALSE(Surrogate(Reinforce{}).traits().of_log_ratio);
  const Traits silent = Surrogate(Quadratic{}).traits();
  EXPECT_TRUE(silent.of_log_ratio && silent.homogeneous && silent.pulls_back);
  EXPECT_FALSE(silent.stops_gradient || silent.clips);
}

TEST(PolicyObjective, ChoicesAreSetByName) {
  PolicyObjective objective = presets::ppo();
  set_choice("policy_loss", objective, "level", "sequence_mean");
  set_choice("policy_loss", objective, "aggregation", "sequence_mean_token_sum");
  set_choice("policy_loss", objective, "kl_gradient", "k2");
  set_choice("policy_loss", objective, "kl_correction", "ratio");
  set_choice("policy_loss", objective, "allow_biased_gradient", "true");
  EXPECT_EQ(objective.level, RatioLevel::sequence_mean);
  EXPECT_EQ(objective.aggregation.mode, Aggregation::Mode::sequence_mean_token_sum);
  EXPECT_TRUE(objective.kl.gradient == KlForm(K2{}));
  EXPECT_EQ(message([&] { set_choice("f", objective, "kl_estimator", "x"); }),
            "f: kl_estimator must be one of k1, k2, k3, low_var_kl, abs, got \"x\"");
  EXPECT_EQ(objective.kl.correction, KlCorrection::ratio);
  EXPECT_TRUE(objective.kl.allow_biased_gradient);
  EXPECT_EQ(
      message([&] { set_choice("f", objective, "level", "turn"); }),
      "f: level must be one of token, sequence_mean, sequence_token, sequence_sum, turn_mean, "
      "turn_token, turn_sum, got \"turn\"");
  std::string weights;
  for_each_weight([&](const auto& row) { weights += ", " + std::string(row.name); });
  EXPECT_EQ(message([&] { set_choice("f", objective, "levels", "token"); }),
            "f: choice must be one of level, aggregation, kl_estimator, kl_gradient, "
            "kl_correction, kl_reference, allow_biased_gradient" +
                weights + ", got \"levels\"");
}

// kl_penalty.h: the three that are the gradient of no KL divergence.
TEST(PolicyObjective, BiasedGradientsOfThePenaltyAreRefusedUnlessAllowed) {
  for (size_t i = 0; i < kKlCorrectionNames.size(); ++i) {
    const auto correction = static_cast<KlCorrection>(i);
    for (const KlForm& gradient : {KlForm(K1{}), KlForm(K2{}), KlForm(K3{}), KlForm(KlAbs{})}) {
      PolicyObjective objective = presets::grpo(0.04);
      objective.kl.gradient = gradient;
      objective.kl.correction = correction;
      const bool through =
          correction == KlCorrection::ratio || correction == KlCorrection::level_ratio ||
          correction == KlCorrection::on_policy || correction == KlCorrection::rollout_ratio;
      const bool biased =
          gradient == KlForm(KlAbs{}) || gradient == (through ? KlForm(K2{}) : KlForm(K1{}));
      EXPECT_EQ(message([&] { check_objective("f", objective); }) != "no error", biased);
      objective.kl.allow_biased_gradient = true;
      EXPECT_EQ(message([&] { check_objective("f", objective); }), "no error");
    }
  }
  PolicyObjective objective = presets::grpo(0.04);
  objective.kl.gradient = K1{};
  EXPECT_EQ(message([&] { check_objective("policy_loss", objective); }),
            "policy_loss: kl_gradient must be k2 or k3 or low_var_kl with kl_correction none, got "
            "k1, whose "
            "gradient is not that of a KL divergence. Choose another one or set "
            "allow_biased_gradient");
  objective.kl.gradient = K2{};
  objective.kl.correction = KlCorrection::ratio;
  EXPECT_EQ(message([&] { check_objective("policy_loss", objective); }),
            "policy_loss: kl_gradient must be k1 or k3 or low_var_kl with kl_correction ratio, got "
            "k2, whose "
            "gradient is not that of a KL divergence. Choose another one or set "
            "allow_biased_gradient");
}

}  // namespace
}  // namespace tether
