#include <gtest/gtest.h>

#include <set>
#include <string>
#include <typeinfo>
#include <vector>

#include "testing/policy_checks.h"

// Every objective of the library against every property that its traits allow.

namespace tether {
namespace {

using testing::check_policy_loss;
using testing::PolicyTraits;
using testing::traits_of;

using Call = LossOutput (*)(const PolicyBatch&, const PolicyObjective&, const Normalizer&);

void expect_good(const PolicyObjective& objective, Call call, const PolicyTraits& traits,
                 const testing::CheckOptions& options = {}) {
  const auto report =
      check_policy_loss([&](const PolicyBatch& batch,
                            const Normalizer& step) { return call(batch, objective, step); },
                        traits, options);
  EXPECT_TRUE(report.ok()) << report;
}

class PolicyCatalogue : public ::testing::TestWithParam<CatalogueRow> {};

TEST_P(PolicyCatalogue, KernelKeepsEveryPromise) {
  const PolicyObjective objective = GetParam().preset();
  expect_good(objective, policy_loss, traits_of(objective));
}

// Whether a row before it takes the same formula at the same level; weights have tests of their
// own.
bool repeats_another(const CatalogueRow& row) {
  const PolicyObjective objective = row.preset();
  for (const CatalogueRow& before : kCatalogue) {
    if (before.name == row.name) return false;
    const PolicyObjective other = before.preset();
    if (other.surrogate.type() == objective.surrogate.type() && other.level == objective.level &&
        clips_log_ratios(other) == clips_log_ratios(objective)) {
      return true;
    }
  }
  return false;
}

TEST_P(PolicyCatalogue, AnyDevicePathKeepsTheSamePromisesUpToRounding) {
  if (repeats_another(GetParam())) GTEST_SKIP() << "as a row before it, at torch's speed";
  const PolicyObjective objective = GetParam().preset();
  PolicyTraits traits = traits_of(objective);
  traits.bitwise = false;
  // torch adds the tokens of a row one after the other.
  if (objective.level == RatioLevel::sequence_sum) traits.tolerance *= 8;
  expect_good(objective, detail::policy_loss_any_device, traits, {.batches = 1});
}

using Names = std::set<std::string>;

// The properties that the traits of the row's formula excuse it from, and those that it fails where
// they do not.
struct Excuses {
  Names declared, needed;
};

Excuses excuses_of(const CatalogueRow& row) {
  PolicyObjective objective = row.preset();
  objective.level = RatioLevel::token;
  objective.weights.clear();
  const Traits& formula = objective.surrogate.traits();
  PolicyTraits traits = traits_of(objective);
  Names declared;
  if (!formula.homogeneous) {
    traits.scales_with_advantages = true;
    declared.insert("advantage_scale");
  }
  if (!formula.of_log_ratio) {
    traits.is_function_of_log_ratio = true;
    declared.insert("shift");
  }
  if (formula.stops_gradient) {
    traits.gradient_is_derivative = true;
    declared.insert("finite_difference");
  }
  const auto report =
      check_policy_loss([&](const PolicyBatch& batch,
                            const Normalizer& step) { return policy_loss(batch, objective, step); },
                        traits, {.batches = 2});
  const auto failed = report.failed();
  return {declared, Names(failed.begin(), failed.end())};
}

// What one row of a formula needs another may do without: drpo and cfpo.
TEST_P(PolicyCatalogue, TheTraitsOfItsFormulaAreNoExcuse) {
  auto [unneeded, needed] = excuses_of(GetParam());
  for (const std::string& each : needed) {
    EXPECT_EQ(unneeded.erase(each), 1u) << each << " fails, and no trait says so";
  }
  const std::type_info& formula = GetParam().preset().surrogate.type();
  for (const CatalogueRow& row : kCatalogue) {
    if (unneeded.empty()) break;
    if (row.name == GetParam().name || row.preset().surrogate.type() != formula) continue;
    for (const std::string& each : excuses_of(row).needed) unneeded.erase(each);
  }
  EXPECT_EQ(unneeded, Names{});
}

INSTANTIATE_TEST_SUITE_P(Rows, PolicyCatalogue, ::testing::ValuesIn(kCatalogue),
                         [](const auto& row) { return std::string(row.param.name); });

// Every weight of the library at every level, and all of them at once.
class WeightLevels : public ::testing::TestWithParam<WeightLevel> {};

PolicyObjective weighted_grpo() {
  PolicyObjective out = presets::grpo(0.1);
  out.surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28};
  return out;
}

TEST_P(WeightLevels, KeepEveryPromise) {
  for_each_weight([&](const auto& row) {
    SCOPED_TRACE(row.name);
    PolicyObjective objective = weighted_grpo();
    objective.weights = {{row.defaults, GetParam()}};
    PolicyTraits traits = traits_of(objective);
    // A sum beyond 100, as a float, is known to 4e-6, and so is its exponential.
    if (GetParam() == WeightLevel::sequence_sum) traits.tolerance *= 8;
    expect_good(objective, policy_loss, traits, {.batches = 1});
  });
}

TEST_P(WeightLevels, TogetherKeepEveryPromiseOnAnyDevice) {
  std::vector<PolicyObjective> objectives;
  for_each_weight([&](const auto& row) {
    if (objectives.empty() || objectives.back().weights.size() == kMaxWeights) {
      objectives.push_back(weighted_grpo());
      objectives.back().level = RatioLevel::sequence_mean;
    }
    objectives.back().weights.push_back({row.defaults, GetParam()});
  });
  for (size_t i = 0; i < objectives.size(); ++i) {
    PolicyTraits traits = traits_of(objectives[i]);
    expect_good(objectives[i], policy_loss, traits, {.batches = 1});
    // At torch's speed: some of them at each level.
    if (i != static_cast<size_t>(GetParam()) % objectives.size()) continue;
    traits.bitwise = false;
    expect_good(objectives[i], detail::policy_loss_any_device, traits, {.batches = 1});
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, WeightLevels,
                         ::testing::Values(WeightLevel::token, WeightLevel::sequence_mean,
                                           WeightLevel::sequence_sum, WeightLevel::sequence_min,
                                           WeightLevel::sequence_max, WeightLevel::turn_mean,
                                           WeightLevel::turn_max));

TEST(Aggregations, KeepEveryPromiseWithPenaltyAndUnequalClip) {
  for (const Aggregation& aggregation :
       {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
        sequence_sum_over_constant(9), token_sum()}) {
    SCOPED_TRACE(kAggregationNames[static_cast<size_t>(aggregation.mode)]);
    const PolicyObjective objective{.surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3},
                                    .aggregation = aggregation};
    expect_good(objective, policy_loss, traits_of(objective));
  }
}

TEST(Penalties, WeighedByTheEnginesRatioKeepEveryPromise) {
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean}) {
    const PolicyObjective objective{.level = level,
                                    .surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3, .correction = KlCorrection::rollout_ratio},
                                    .aggregation = token_mean()};
    PolicyTraits traits = traits_of(objective);
    EXPECT_TRUE(traits.needs_rollout_logps);
    expect_good(objective, policy_loss, traits);
    traits.bitwise = false;
    expect_good(objective, detail::policy_loss_any_device, traits, {.batches = 2});
  }
}

TEST(Penalties, WeighedByTheRatioOfTheLevelKeepEveryPromise) {
  for (const LevelRule& rule : kLevelRules) {
    SCOPED_TRACE(rule.name);
    const auto level = static_cast<RatioLevel>(&rule - kLevelRules.data());
    const PolicyObjective objective{.level = level,
                                    .surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3, .correction = KlCorrection::level_ratio},
                                    .aggregation = sequence_mean_token_mean()};
    PolicyTraits traits = traits_of(objective);
    // Sums of log-ratios are soon beyond the largest weight of a penalty in float, e^20.
    if (rule.shared && !rule.is_mean) traits.dtypes = {at::kDouble};
    traits.penalty_pulls = !shares_ratio(level);
    expect_good(objective, policy_loss, traits);
    traits.bitwise = false;
    expect_good(objective, detail::policy_loss_any_device, traits, {.batches = 2});
  }
}

// REINFORCE by way of the ratio, as a user writes it: it has nothing to say of its traits.
struct PlainRatio {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -token.ratio * token.advantage;
  }
};

// The same with a pull to improbable tokens, kept secret or told.
struct SecretPull {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return PlainRatio{}(token) + token.logp * 0.01;
  }
};
struct ToldPull : SecretPull {
  static constexpr Traits traits{.of_log_ratio = false, .homogeneous = false, .pulls_back = false};
};

TEST(OwnSurrogates, HaveTheDefaultTraitsIfTheyStateNone) {
  const auto report_of = [](const Surrogate& surrogate) {
    const PolicyObjective objective{.surrogate = surrogate};
    return check_policy_loss(
        [&](const PolicyBatch& batch, const Normalizer& step) {
          return policy_loss(batch, objective, step);
        },
        traits_of(objective), {.batches = 3});
  };
  EXPECT_TRUE(report_of(PlainRatio{}).ok()) << report_of(PlainRatio{});
  for (const char* broken : {"shift", "advantage_scale", "on_policy"}) {
    EXPECT_EQ(report_of(SecretPull{})[broken].outcome, testing::Outcome::fails) << broken;
  }
  const auto told = report_of(ToldPull{});
  EXPECT_EQ(told.failed(), std::vector<std::string>{"on_policy"}) << told;
}

}  // namespace
}  // namespace tether
