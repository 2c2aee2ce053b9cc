#include "rl/token_weight.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "rl/catalogue.h"
#include "rl/kernels/weight_block.h"
#include "tests/error_message.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// A user's own: one number for every token, and one that a token brings.
struct Fixed {
  double value = 0.5;

  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.advantage;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return 0 * x + value;
  }
};
template <bool kSaid = true>
struct OfRollout {
  static constexpr Traits traits{.needs_rollout_logps = kSaid};
  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.rollout_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return x;
  }
};

// Beside those that it has.
PolicyObjective weighted(PolicyObjective objective, const std::vector<TokenWeight>& weights) {
  objective.weights.insert(objective.weights.end(), weights.begin(), weights.end());
  return objective;
}

std::map<std::string, double> metrics_of(Batch<double>& batch, const PolicyObjective& objective) {
  return batch.run(objective).metrics.to_map();
}

// What a weight of one half does to every part of a loss: S alone sees it.
TEST(TokenWeight, IsSeenByTheSurrogateAlone) {
  for (const CatalogueRow& row : kCatalogue) {
    for (const Aggregation::Mode mode :
         {Aggregation::Mode::token_mean, Aggregation::Mode::sequence_mean_token_mean}) {
      SCOPED_TRACE(row.name);
      Batch<double> batch = random_batch<double>(5, 37);
      PolicyObjective plain = row.preset();
      plain.aggregation.mode = mode;
      plain.kl = {};
      const double without = batch.run(plain).loss;
      const std::vector<double> slopes = batch.dlogps;
      const auto before = metrics_of(batch, plain);
      const PolicyObjective half = weighted(plain, {{Fixed{}}});
      EXPECT_NEAR(batch.run(half).loss, without / 2, 1e-15 * std::abs(without));
      for (size_t i = 0; i < slopes.size(); ++i) EXPECT_EQ(batch.dlogps[i], slopes[i] / 2) << i;
      auto after = metrics_of(batch, half);
      EXPECT_NEAR(after.at("policy_loss"), before.at("policy_loss") / 2, 1e-15);
      EXPECT_EQ(after.at("weight_mean"), before.at("weight_mean") / 2);
      EXPECT_EQ(after.at("weight_squared_mean"), before.at("weight_squared_mean") / 4);
      EXPECT_EQ(after.at("weight_max"), before.at("weight_max") / 2);
      for (const auto name : {"policy_loss", "weight_mean", "weight_squared_mean", "weight_max"}) {
        after[name] = before.at(name);
      }
      EXPECT_EQ(after, before);

      plain.kl = {.beta = 0.5};
      const double penalised = batch.run(plain).loss;
      const std::vector<double> all = batch.dlogps;
      EXPECT_NEAR(batch.run(weighted(plain, {{Fixed{}}})).loss, penalised - without / 2,
                  1e-14 * std::abs(penalised));
      for (size_t i = 0; i < all.size(); ++i) {
        EXPECT_NEAR(batch.dlogps[i], all[i] - slopes[i] / 2, 1e-15) << i;
      }
    }
  }
}

// What leaves is as if the mask had been 0 from the start: every part of the loss sees that.
TEST(TokenWeight, ThatLeavesIsOutOfTheMask) {
  for (const CatalogueRow& row : kCatalogue) {
    SCOPED_TRACE(row.name);
    Batch<double> batch = random_batch<double>(5, 37), left = batch;
    PolicyObjective objective = row.preset();
    objective.kl.beta = 0.5;
    size_t gone = 0;
    for (size_t i = 0; i < left.mask.size(); ++i) {
      const double ratio = std::exp(left.old_logps[i] - left.rollout_logps[i]);
      if (left.mask[i] == 0 || (ratio >= 0.8 && ratio <= 1.5)) continue;
      left.mask[i] = 0;
      batch.logps[i] = NAN;  // nor is it read
      ++gone;
    }
    EXPECT_GT(gone, 10u);
    const PolicyTotals by_hand = left.run(objective);
    const auto gate = weighted(objective, {{RatioGate{.low = 0.8, .high = 1.5}}});
    const PolicyTotals gated = batch.run(gate);
    EXPECT_EQ(gated.loss, by_hand.loss);
    EXPECT_EQ(batch.dlogps, left.dlogps);
    EXPECT_EQ(gated.metrics.sums, by_hand.metrics.sums);
    EXPECT_EQ(gated.metrics.maxima, by_hand.metrics.maxima);
    const Normalizer counts = local_counts(batch.arrays(), gate);
    EXPECT_EQ(*counts.policy, by_hand.metrics.to_map().at("tokens"));
  }
}

TEST(TokenWeight, ThatLeavesIsRefusedWhereItIsNan) {
  Batch<float> batch = random_batch<float>(2, 30);
  batch.mask.assign(60, 1);
  batch.rollout_logps[37] = float(infinity);
  const auto gate = [](WeightLevel level) {
    return weighted(presets::ppo(), {{RatioGate{}, level}});
  };
  EXPECT_EQ(message([&] { batch.run(gate(WeightLevel::token)); }),
            "policy_loss: weights that take tokens out, ratio_gate, must be numbers, got nan at "
            "[1, 7]");
  EXPECT_EQ(message([&] { local_counts(batch.arrays(), gate(WeightLevel::sequence_sum)); }),
            "local_counts: weights that take tokens out, ratio_gate, must be numbers, got nan at "
            "[1, 0]");
  batch.mask[37] = 2;
  EXPECT_EQ(message([&] { batch.run(gate(WeightLevel::token)); }),
            message([&] { batch.run(presets::ppo()); }));
}

// The statistic of one that stays is of the tokens that are left; those that leave see the mask.
TEST(TokenWeight, ThoseThatStaySeeWhoIsLeft) {
  Batch<double> batch(1, 3);
  batch.mask = {1, 1, 1};
  batch.rollout_logps = {-0.1, -0.2, -3};
  batch.advantages.assign(3, -1);
  const auto objective =
      weighted(presets::ppo(), {{TruncatedImportance{.high = 100}, WeightLevel::sequence_sum},
                                {RatioGate{.low = 0.1, .high = 2}}});
  EXPECT_NEAR(batch.run(objective).loss, std::exp(0.3), 1e-15);
}

TEST(TokenWeight, EntropiesDoNotSeeIt) {
  Batch<double> batch = random_batch<double>(3, 20);
  PolicyArrays arrays = batch.arrays();
  std::vector<double> entropies(60, 0.7), gradient(60), weighted_gradient(60);
  arrays.entropies = batch.view(entropies);
  PolicyObjective objective = presets::ppo();
  objective.entropy.coefficient = 0.25;
  const auto into = [&](std::vector<double>& out) {
    return PolicyGradients{.entropies = {out.data(), DType::float64, 20, 1}};
  };
  const double bonus = policy_loss(arrays, presets::ppo(), {}, {}).loss -
                       policy_loss(arrays, objective, {}, into(gradient)).loss;
  const PolicyObjective none = weighted(objective, {{Fixed{0}}});
  EXPECT_NEAR(policy_loss(arrays, none, {}, into(weighted_gradient)).loss, -bonus, 1e-15);
  EXPECT_EQ(weighted_gradient, gradient);
}

TEST(TokenWeight, SaysWhatItReads) {
  Batch<double> batch = random_batch<double>(2, 9);
  EXPECT_TRUE(std::isnan(batch.run(weighted(presets::ppo(), {{OfRollout<false>{}}})).loss));
}

// 0 / 0 where there are no tokens, and nothing of it in the metrics.
struct Fraction {
  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.old_logp / token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& x) const {
    return x;
  }
};

TEST(TokenWeight, IsOfActiveTokensAlone) {
  Batch<double> batch = random_batch<double>(2, 9);
  for (const WeightLevel level : {WeightLevel::token, WeightLevel::sequence_mean}) {
    const auto metrics = metrics_of(batch, weighted(presets::ppo(), {{Fraction{}, level}}));
    EXPECT_EQ(metrics.at("weight_squared_mean"), 1);
    EXPECT_EQ(metrics.at("weight_ess"), 1);
    EXPECT_EQ(metrics.at("weight_max"), 1);
  }
}

// Of a row's statistic a broken token is a part, even where the measure saturates.
TEST(TokenWeight, AnInfiniteLogpSpoilsTheRowThatItIsMeasuredIn) {
  Batch<double> batch = random_batch<double>(2, 20);
  batch.mask.assign(40, 1);
  batch.logps[3] = infinity;
  const auto objective = weighted(presets::ppo(), {{TvMask{}, WeightLevel::sequence_max}});
  EXPECT_EQ(batch.run(objective).metrics.to_map().at("nonfinite"), 20);
}

TEST(TokenWeight, WithoutOneEveryTokenWeighsOne) {
  Batch<double> batch = random_batch<double>(2, 9);
  const auto metrics = metrics_of(batch, presets::ppo());
  for (const auto name : {"weight_mean", "weight_squared_mean", "weight_ess", "weight_max"}) {
    EXPECT_EQ(metrics.at(name), 1) << name;
  }
  EXPECT_EQ(metrics.at("weight_zero_fraction"), 0);
  batch.mask.assign(batch.mask.size(), 0);
  EXPECT_EQ(metrics_of(batch, presets::ppo()).at("weight_max"), 0);
}

// Trainers multiply by the importance weight after the smaller of both surrogates was taken, and
// add the penalty unweighted (TRL, verl).
TEST(TokenWeight, MultipliesAfterTheClip) {
  Batch<double> batch(1, 1);
  batch.mask = {1};
  batch.old_logps = {-1};
  batch.logps = {-1 + std::log(1.5)};
  batch.advantages = {2};
  batch.rollout_logps = {-1 - std::log(1.25)};
  batch.ref_logps = {batch.logps[0] + 0.3};
  PolicyObjective objective = presets::ppo();
  objective.weights = {{TruncatedImportance{}}};
  EXPECT_NEAR(batch.run(objective).loss, -1.25 * 1.2 * 2, 1e-15);
  EXPECT_EQ(batch.dlogps[0], 0);
  EXPECT_EQ(metrics_of(batch, objective).at("clip_fraction_high"), 1);
  objective.kl.beta = 0.5;
  const double k3 = std::exp(0.3) - 1 - 0.3;
  EXPECT_NEAR(batch.run(objective).loss, -1.25 * 1.2 * 2 + 0.5 * k3, 1e-15);
  EXPECT_NEAR(batch.dlogps[0], 0.5 * (1 - std::exp(0.3)), 1e-15);
}

TEST(TokenWeight, SeveralMultiply) {
  Batch<double> batch = random_batch<double>(4, 30);
  const double plain = batch.run(presets::ppo()).loss;
  const auto both = weighted(presets::ppo(), {{Fixed{0.5}}, {Fixed{0.25}, WeightLevel::token}});
  EXPECT_NEAR(batch.run(both).loss, plain / 8, 1e-15);
}

TEST(TokenWeight, SeveralOfSequencesHaveStatisticsOfTheirOwn) {
  Batch<double> batch(1, 3);
  batch.mask = {1, 1, 1};
  batch.rollout_logps = {2, 3, -4};
  batch.advantages.assign(3, -1);  // each token's loss is 1
  const auto objective = weighted(presets::ppo(), {{OfRollout<>{}, WeightLevel::sequence_sum},
                                                   {OfRollout<>{}, WeightLevel::sequence_min},
                                                   {OfRollout<>{}, WeightLevel::token},
                                                   {OfRollout<>{}, WeightLevel::sequence_max}});
  EXPECT_NEAR(batch.run(objective).loss, 1 * -4 * (2 + 3 - 4) * 3 / 3.0, 1e-14);
}

// By the weights of the mask: mean and sum over w, extremes over what is active.
TEST(TokenWeight, ReducesOverTheActiveTokensOfItsRow) {
  Batch<double> batch(2, 4);
  batch.mask = {1, 0, 0.5, 0.25, 0, 0, 0, 1};
  batch.rollout_logps = {2, NAN, 3, -4, NAN, 9, 9, 5};
  batch.advantages.assign(8, -1);  // each token's loss is 1
  struct Row {
    WeightLevel level;
    double statistic;
  };
  for (const Row& row : {Row{WeightLevel::sequence_sum, 2 + 1.5 - 1},
                         Row{WeightLevel::sequence_mean, (2 + 1.5 - 1) / 1.75},
                         Row{WeightLevel::sequence_min, -4}, Row{WeightLevel::sequence_max, 3}}) {
    PolicyObjective objective = weighted(presets::ppo(), {{OfRollout<>{}, row.level}});
    objective.aggregation = token_sum();
    EXPECT_NEAR(batch.run(objective).loss, 1.75 * row.statistic + 5, 1e-15);
    const auto metrics = metrics_of(batch, objective);
    EXPECT_NEAR(metrics.at("weight_mean"), (1.75 * row.statistic + 5) / 2.75, 1e-15);
    EXPECT_EQ(metrics.at("weight_max"), 5);
    EXPECT_EQ(metrics.at("nonfinite"), 0);
  }
}

// Two turns and one in the next row, told apart by runs of the mask, by ids that ascend, and by ids
// with anything in masked slots.
TEST(TokenWeight, ReducesOverTheActiveTokensOfItsTurn) {
  Batch<double> batch(2, 5);
  batch.mask = {1, 0.5, 0, 0.25, 1, 0, 0, 0, 0, 1};
  batch.rollout_logps = {2, 3, NAN, -4, 6, NAN, 9, 9, NAN, 5};
  batch.advantages.assign(10, -1);  // each token's loss is 1
  struct Row {
    WeightLevel level;
    double first, second;
  };
  for (const std::vector<int64_t>& ids :
       {std::vector<int64_t>{}, {0, 0, 1, 1, 1, 0, 0, 0, 0, 0}, {3, 3, -7, 4, 4, 9, 0, 9, 1, 3}}) {
    batch.turn_ids = ids;
    for (const Row& row : {Row{WeightLevel::turn_sum, 2 + 1.5, -1 + 6},
                           Row{WeightLevel::turn_mean, (2 + 1.5) / 1.5, (-1 + 6) / 1.25},
                           Row{WeightLevel::turn_min, 2, -4}, Row{WeightLevel::turn_max, 3, 6}}) {
      PolicyObjective objective = weighted(presets::ppo(), {{OfRollout<>{}, row.level}});
      objective.aggregation = token_sum();
      EXPECT_NEAR(batch.run(objective).loss, 1.5 * row.first + 1.25 * row.second + 5, 1e-14);
      EXPECT_EQ(metrics_of(batch, objective).at("nonfinite"), 0);
    }
  }
}

// The same numbers to a rounding, and the same bits by ids or by runs.
template <class T>
void expect_turns_between_tokens_and_rows() {
  Batch<T> batch = random_batch<T>(3, 700);
  const auto run = [&](WeightLevel level, const std::vector<int64_t>& ids) {
    batch.turn_ids = ids;
    return batch.run(weighted(presets::ppo(), {{TruncatedImportance{}, level}})).loss;
  };
  std::vector<int64_t> each(2100);
  std::iota(each.begin(), each.end(), 0);
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  const std::vector<int64_t> one(2100, 1);
  const auto expect_near = [&](double a, double b) { EXPECT_NEAR(a, b, tolerance * std::abs(b)); };
  expect_near(run(WeightLevel::turn_mean, one), run(WeightLevel::sequence_mean, {}));
  expect_near(run(WeightLevel::turn_sum, one), run(WeightLevel::sequence_sum, {}));
  EXPECT_EQ(run(WeightLevel::turn_min, one), run(WeightLevel::sequence_min, {}));
  EXPECT_EQ(run(WeightLevel::turn_max, one), run(WeightLevel::sequence_max, {}));
  expect_near(run(WeightLevel::turn_mean, each), run(WeightLevel::token, {}));
  EXPECT_EQ(run(WeightLevel::turn_min, each), run(WeightLevel::token, {}));
}
TEST(TokenWeight, OfTurnsIsThatOfRowsOrTokensWhereTheyAreOne) {
  expect_turns_between_tokens_and_rows<double>();
  expect_turns_between_tokens_and_rows<float>();
}

// Of three turns the second goes, for one token of it; without ids the run of another weight that
// stays is still the caller's.
TEST(TokenWeight, OfATurnTakesTheWholeTurnOut) {
  Batch<double> batch(1, 7);
  batch.mask = {1, 1, 0, 1, 1, 0, 1};
  batch.old_logps = batch.logps = {-1, -1, 0, -1, -1, 0, -1};
  batch.rollout_logps = {-1, -1, 0, -1, -3, 0, -1};
  batch.advantages = {-1, -2, 0, -4, -8, 0, -16};
  PolicyObjective objective =
      weighted(presets::ppo(), {{RatioGate{.low = 0.5, .high = 2}, WeightLevel::turn_max}});
  EXPECT_NEAR(batch.run(objective).loss, (1 + 2 + 16) / 3.0, 1e-15);
  EXPECT_EQ(local_counts(batch.arrays(), objective).policy, 3);
  batch.turn_ids = {0, 0, 0, 1, 2, 2, 2};
  EXPECT_NEAR(batch.run(objective).loss, (1 + 2 + 4) / 3.0, 1e-15);
  EXPECT_EQ(local_counts(batch.arrays(), objective).policy, 3);
  batch.turn_ids[4] = 0;
  const auto text = "policy_loss: turn_ids must not decrease along a row, got 0 after 1 at [0, 4]";
  EXPECT_EQ(message([&] { batch.run(objective); }), text);
  objective.weights = {{TruncatedImportance{}, WeightLevel::turn_mean}};
  EXPECT_EQ(message([&] { batch.run(objective); }), text);
}

// A turn of which a weight takes the middle out is still one: W = e^(mean 0.1, 0.3) of both.
TEST(TokenWeight, OfTurnsDoNotSeeHolesThatAnotherMade) {
  Batch<double> batch(1, 3);
  batch.mask = {1, 1, 1};
  batch.old_logps = batch.logps = {-1, -1, -1};
  batch.rollout_logps = {-1.1, -9, -1.3};
  batch.advantages.assign(3, -1);
  const auto objective = weighted(
      presets::ppo(),
      {{RatioGate{.low = 0.5, .high = 2}}, {TruncatedImportance{}, WeightLevel::turn_mean}});
  EXPECT_NEAR(batch.run(objective).loss, std::exp(0.2), 1e-15);
}

// What the trait says: of the columns the sign of A alone.
TEST(TokenWeight, BySignIsTrueOfThoseThatSayIt) {
  int stated = 0;
  for_each_weight([&](const auto& row) {
    const WeightFormula formula = row.defaults;
    if (!formula.traits().by_sign) return;
    ++stated;
    double nans[16], advantage[16], statistic[16], weight[16];
    for (int i = 0; i < 16; ++i) {
      nans[i] = NAN;
      advantage[i] = (i % 4 - 1) * (1 + 0.3 * i);
      statistic[i] = 0.2 * (i / 4) - 0.3;
      weight[i] = 1;
    }
    formula.multiply(WeightColumns<double>{nans, nans, nans, nans, advantage, 16}, statistic,
                     weight);
    for (int i = 0; i < 16; ++i) {
      const auto [negative, zero, positive] = weights_of_signs(formula, statistic[i]);
      const double A = advantage[i];
      EXPECT_EQ(weight[i], A < 0 ? negative : A > 0 ? positive : zero) << row.name << " " << i;
    }
  });
  EXPECT_EQ(stated, 3);
}

// The same bits as without it.
struct SoftSequenceByToken : SoftSequenceWeight {
  static constexpr Traits traits{.reads_policy = true};
};
template <class T>
void expect_the_same_by_token() {
  Batch<T> batch = random_batch<T>(5, 700);
  for (T& each : batch.advantages) each = std::abs(each) < T(0.3) ? T(0) : each;
  const auto run = [&](const WeightFormula& formula) {
    const PolicyTotals out = batch.run(weighted(presets::reinforce(), {{formula}}));
    return std::pair(out.loss, batch.dlogps);
  };
  EXPECT_EQ(run(SoftSequenceWeight{}), run(SoftSequenceByToken{}));
}
// It says less than it looks at.
struct OfRolloutAllTheSame : OfRollout<> {
  static constexpr Traits traits{.needs_rollout_logps = true, .by_sign = true};
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>& token, const Number& x) const {
    return x + token.rollout_logp;
  }
};
TEST(TokenWeight, BySignThatIsUntrueIsNaN) {
  Batch<double> batch = random_batch<double>(2, 5);
  const auto objective =
      weighted(presets::ppo(), {{OfRolloutAllTheSame{}, WeightLevel::sequence_sum}});
  EXPECT_TRUE(std::isnan(batch.run(objective).loss));
}
TEST(TokenWeight, BySignChangesNoBit) {
  expect_the_same_by_token<double>();
  expect_the_same_by_token<float>();
}

// The gradient is that of the value with W held, at every level of the ratio.
TEST(TokenWeight, GradientIsThatOfTheWeightedLoss) {
  for (const RatioLevel level :
       {RatioLevel::token, RatioLevel::sequence_mean, RatioLevel::sequence_sum}) {
    for (const WeightLevel of : {WeightLevel::token, WeightLevel::sequence_mean}) {
      Batch<double> batch = random_batch<double>(3, 6);
      PolicyObjective objective = weighted(presets::ppo(), {{TruncatedImportance{}, of}});
      objective.level = level;
      batch.run(objective);
      const std::vector<double> slopes = batch.dlogps;
      for (size_t i = 0; i < slopes.size(); ++i) {
        const double logp = batch.logps[i], h = 1e-6;
        batch.logps[i] = logp + h;
        const double above = batch.run(objective).loss;
        batch.logps[i] = logp - h;
        const double below = batch.run(objective).loss;
        batch.logps[i] = logp;
        EXPECT_NEAR((above - below) / (2 * h), slopes[i], 1e-9) << i;
      }
    }
  }
}

template <class T>
void expect_broken_token(WeightLevel level, T rollout_logp) {
  Batch<T> batch = random_batch<T>(3, 40);
  batch.mask.assign(120, 1);
  const auto objective = weighted(presets::ppo(), {{TruncatedImportance{}, level}});
  batch.run(objective);
  const std::vector<T> before = batch.dlogps;
  batch.rollout_logps[45] = rollout_logp;
  const PolicyTotals out = batch.run(objective);
  EXPECT_TRUE(std::isnan(out.loss));
  const bool of_row = level != WeightLevel::token;  // whose tokens are one turn
  EXPECT_EQ(out.metrics.to_map().at("nonfinite"), of_row ? 40 : 1);
  for (size_t i = 0; i < 120; ++i) {
    const bool broken = of_row ? i / 40 == 1 : i == 45;
    EXPECT_TRUE(broken ? std::isnan(batch.dlogps[i]) : batch.dlogps[i] == before[i]) << i;
  }
}

// The clamp would hide an infinity.
TEST(TokenWeight, ABrokenOneSpoilsTheTokensThatItWeighs) {
  for (const double broken : {double(NAN), infinity, -infinity}) {
    for (size_t i = 0; i < kWeightLevelRules.size(); ++i) {
      const auto level = static_cast<WeightLevel>(i);
      expect_broken_token<double>(level, broken);
      expect_broken_token<float>(level, float(broken));
    }
  }
}

// At every level of the ratio, where a row's slopes are added up too.
TEST(TokenWeight, ThatOverflowsTheLossGivesFiniteResults) {
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean,
                                 RatioLevel::sequence_token, RatioLevel::sequence_sum}) {
    Batch<float> batch(1, 2);
    batch.mask = {1, 1};
    batch.logps = {-1, -1};
    batch.old_logps = {-80, -80};
    batch.rollout_logps = {-85, -85};
    batch.advantages = {-1e12f, -1e12f};
    PolicyObjective objective = weighted(presets::ppo(), {{TruncatedImportance{.high = 3}}});
    objective.level = level;
    const PolicyTotals out = batch.run(objective);
    EXPECT_TRUE(std::isfinite(out.loss));
    EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 0);
    for (const float slope : batch.dlogps) EXPECT_TRUE(std::isfinite(slope) && slope > 0);
  }
}

TEST(TokenWeight, FiniteInputsGiveFiniteResults) {
  for (const float rollout : {-3e38f, 3e38f}) {
    for (const float old : {-1.0f, -3e38f}) {
      for (const WeightLevel level : {WeightLevel::token, WeightLevel::sequence_sum}) {
        Batch<float> batch(1, 20);
        batch.mask.assign(20, 1);
        batch.logps.assign(20, -1);
        batch.old_logps.assign(20, old);
        batch.rollout_logps.assign(20, rollout);
        batch.advantages.assign(20, 1e12f);
        const TruncatedImportance formula{.high = 1e30};
        const PolicyTotals out = batch.run(weighted(presets::ppo(), {{formula, level}}));
        EXPECT_TRUE(std::isfinite(out.loss)) << rollout << " " << old;
        EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 0);
        for (const float slope : batch.dlogps) EXPECT_TRUE(std::isfinite(slope));
      }
    }
  }
}

TEST(TokenWeight, IsAChoiceByItsName) {
  PolicyObjective objective = presets::grpo();
  set_choice("f", objective, "truncated_importance", "sequence_sum");
  set_option("f", objective, "truncated_importance.high", 3);
  ASSERT_EQ(objective.weights.size(), 1u);
  EXPECT_EQ(objective.weights[0].level, WeightLevel::sequence_sum);
  EXPECT_EQ(objective.weights[0].formula.target<TruncatedImportance>()->high, 3);
  set_choice("f", objective, "tv_mask", "token");
  set_option("f", objective, "tv_mask.high", 0.1);
  set_choice("f", objective, "truncated_importance", "none");
  ASSERT_EQ(objective.weights.size(), 1u);
  EXPECT_EQ(objective.weights[0].formula.target<TvMask>()->high, 0.1);
  EXPECT_EQ(message([&] { set_choice("f", objective, "tv_mask", "row"); }),
            "f: tv_mask must be one of none, token, sequence_mean, sequence_sum, sequence_min, "
            "sequence_max, turn_mean, turn_sum, turn_min, turn_max, got \"row\"");
}

TEST(TokenWeight, WhatAnObjectiveCannotHaveIsRefused) {
  Batch<double> batch = random_batch<double>(1, 4);
  PolicyArrays arrays = batch.arrays();
  arrays.rollout_logps = {};
  PolicyObjective objective = weighted(presets::ppo(), {{TruncatedImportance{}}});
  EXPECT_EQ(message([&] { policy_loss(arrays, objective, {}, {}); }),
            "policy_loss: rollout_logps must be given for the weight truncated_importance, got "
            "none");
  objective.weights = {{TruncatedImportance{.low = 3, .high = 2}}};
  EXPECT_EQ(message([&] { check_objective("f", objective); }),
            "f: truncated_importance.low must be at most truncated_importance.high 2, got 3");
  objective.weights = {{TvMask{.low = -1}}};
  EXPECT_EQ(message([&] { check_objective("f", objective); }),
            "f: tv_mask.low must be in [0, 1e+12], got -1");
  objective.weights.assign(9, {Fixed{}});
  EXPECT_EQ(message([&] { check_objective("f", objective); }),
            "f: weights must be at most 8, got 9");
}

}  // namespace
}  // namespace tether
