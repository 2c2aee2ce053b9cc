// Promise 2: finite input gives no NaN, in value, gradient and metrics, over the whole range of the
// type.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "rl/catalogue.h"
#include "rl/kernels/preference_loss.h"
#include "rl/kernels/value_loss.h"
#include "tests/rl/links.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

// Of any size, down to subnormal and up to the largest.
template <class T>
T any_finite(std::mt19937& random) {
  std::uniform_real_distribution<double> exponent(-40, std::log10(double(largest_finite)));
  switch (random() % 5) {
    case 0:
      return T(0);
    case 1:
      return random() % 2 ? std::numeric_limits<T>::max() : -std::numeric_limits<T>::max();
    case 2:
      return T(std::normal_distribution<double>()(random));
    default:
      break;
  }
  const double size = std::min(std::pow(10, exponent(random) * (sizeof(T) == 8 ? 1 : 0.125)),
                               double(std::numeric_limits<T>::max()));
  return T(random() % 2 ? size : -size);
}

template <class T>
double size_of_option(std::mt19937& random) {
  return std::min(std::abs(double(any_finite<T>(random))), largest_option);
}

template <class T>
Batch<T> wild_batch(std::mt19937& random) {
  Batch<T> batch(4, 9);
  for (auto* array : {&batch.logps, &batch.old_logps, &batch.ref_logps, &batch.rollout_logps,
                      &batch.advantages}) {
    for (T& each : *array) each = any_finite<T>(random);
  }
  for (T& weight : batch.mask) weight = T(random() % 4 != 0);
  return batch;
}

template <class T>
void expect_no_nan(Batch<T>& batch, const PolicyObjective& objective, const std::string& where) {
  const PolicyTotals out = batch.run(objective);
  EXPECT_FALSE(std::isnan(out.loss)) << where;
  EXPECT_EQ(out.metrics.sums[2 * PolicyMetrics::kNonfinite], 0) << where;
  for (const T each : batch.dlogps) EXPECT_FALSE(std::isnan(each)) << where;
  for (const auto& [name, value] : out.metrics.to_map()) {
    EXPECT_FALSE(std::isnan(value)) << name << " " << where;
  }
}

// Some options of an objective at an end of their range.
void move_to_ends(std::mt19937& random, PolicyObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double& value, const Range& range) {
    if (name.ends_with("low")) return;  // some are at most another
    switch (random() % 4) {
      case 0:
        value = range.high;
        break;
      case 1:
        value = range.above ? value : range.low;
        break;
      default:
        break;
    }
  });
}

template <class T>
void expect_finite_policy_losses() {
  std::mt19937 random(7);
  for (int trial = 0; trial < 200; ++trial) {
    Batch<T> batch = wild_batch<T>(random);
    for (const CatalogueRow& row : kCatalogue) {
      PolicyObjective objective = row.preset();
      objective.level = RatioLevel(random() % kRatioLevelNames.size());
      objective.aggregation.mode = Aggregation::Mode(random() % kAggregationNames.size());
      objective.kl = {.beta = random() % 2 ? 0 : 0.5,
                      .correction = KlCorrection(random() % kKlCorrectionNames.size()),
                      .allow_biased_gradient = true};
      choose(objective.kl.estimator, random() % kKlFormNames.size());
      choose(objective.kl.gradient, random() % kKlFormNames.size());
      if (trial % 2) move_to_ends(random, objective);
      objective.entropy.coefficient = 0;
      if (clips_log_ratios(objective)) objective.kl.correction = KlCorrection::none;
      expect_no_nan(batch, objective, std::string(row.name) + " " + text(trial));
    }
  }
  Batch<T> batch = wild_batch<T>(random);
  expect_no_nan(batch, presets::cispo({.ratio_high = infinity}), "cispo without a bound");
}
TEST(FiniteInputs, GiveNoNaNInPolicyLossesInFloat) { expect_finite_policy_losses<float>(); }
TEST(FiniteInputs, GiveNoNaNInPolicyLossesInDouble) { expect_finite_policy_losses<double>(); }

TEST(FiniteInputs, OfAnyFactorGiveFinitePolicyLosses) {
  std::mt19937 random(12);
  const double factors[] = {0x1p-126, 1e-30, 1, 1e30, largest_finite};
  const auto factor = [&] { return factors[random() % 5]; };
  for (int trial = 0; trial < 100; ++trial) {
    Batch<double> batch = wild_batch<double>(random);
    for (double& weight : batch.mask) weight *= random() % 3 ? 1 : kSmallestWeight;
    const Normalizer normalizer{.policy = factor(),
                                .kl = factor(),
                                .sequences = factor(),
                                .world_size = factor(),
                                .scale = factor()};
    for (const CatalogueRow& row : kCatalogue) {
      PolicyObjective objective = row.preset();
      objective.level = RatioLevel(random() % kRatioLevelNames.size());
      objective.kl.beta = random() % 2 ? 0 : 0.5;
      const PolicyTotals out = batch.run(objective, normalizer);
      EXPECT_TRUE(std::isfinite(out.loss)) << row.name << " " << trial;
      for (const double each : batch.dlogps) {
        EXPECT_TRUE(std::isfinite(each)) << row.name << " " << trial;
      }
    }
  }
}

// What four answers say of themselves, of any size, and other tokens for the NLL.
template <class T>
struct PreferenceSides {
  std::vector<T> labels, baselines, weights, nll_mask;

  explicit PreferenceSides(std::mt19937& random) {
    for (int i = 0; i < 4; ++i) {
      labels.push_back(T(random() % 2));
      baselines.push_back(random() % 2 ? any_finite<T>(random) : T(0));
      weights.push_back(random() % 2 ? std::abs(any_finite<T>(random)) : T(1));
    }
    for (int i = 0; i < 36; ++i) nll_mask.push_back(T(random() % 2));
  }
  PreferenceArrays arrays(const Batch<T>& batch, const PreferenceObjective& objective) const {
    const auto of_rows = [](const std::vector<T>& each) {
      return ConstArray{.data = each.data(),
                        .dtype = dtype<T>(),
                        .row_stride = 1,
                        .column_stride = 0,
                        .per_row = true};
    };
    return {.layout = {.rows = 4, .columns = 9},
            .logps = batch.view(batch.logps),
            .ref_logps = batch.view(batch.ref_logps),
            .response_mask = batch.view(batch.mask),
            .nll_mask = batch.view(nll_mask),
            .labels = objective.loss.takes_labels() ? of_rows(labels) : ConstArray{},
            .baselines = of_rows(baselines),
            .answer_weights = of_rows(weights)};
  }
};

template <class T>
void expect_finite_preference_losses() {
  std::mt19937 random(8);
  for (int trial = 0; trial < 200; ++trial) {
    Batch<T> batch = wild_batch<T>(random);
    const PreferenceSides<T> sides(random);
    for (const PreferenceRow& row : kPreferenceCatalogue) {
      PreferenceObjective objective = row.preset();
      choose_link(objective, random() % kLinkNames.size());
      if (!objective.link.traits().of_log_ratio) {
        for (T& each : batch.logps) each = -std::abs(each);
      }
      objective.score = PairScore(random() % kPairScoreNames.size());
      objective.nll.mean = NllMean(random() % kNllMeanNames.size());
      objective.nll.coefficient = random() % 2 ? 0 : size_of_option<T>(random);
      if (!objective.loss.takes_labels()) objective.ld_alpha = random() % 2 ? 1 : 0.5;
      const PreferenceTotals out = preference_loss(sides.arrays(batch, objective), objective, {},
                                                   {batch.dlogps.data(), dtype<T>(), 9, 1});
      EXPECT_FALSE(std::isnan(out.loss)) << row.name << " " << trial;
      for (const T each : batch.dlogps) EXPECT_FALSE(std::isnan(each)) << row.name << " " << trial;
    }
  }
}
template <class T>
void expect_finite_at_the_ends_of_options() {
  std::mt19937 random(10);
  const double betas[] = {5e-324, 1e-300, 1e-30, 1, 1e6, largest_option};
  const double factors[] = {5e-324, 1, 1e30, largest_finite};
  for (int trial = 0; trial < 200; ++trial) {
    Batch<T> batch = wild_batch<T>(random);
    const T most = std::numeric_limits<T>::max();
    for (T& each : batch.logps) each = random() % 2 ? most : -most;
    if (trial % 5 == 0) std::fill_n(batch.mask.begin(), 9, T(0));  // an answer without tokens
    const PreferenceSides<T> sides(random);
    for (const PreferenceRow& row : kPreferenceCatalogue) {
      PreferenceObjective objective = row.preset();
      choose_link(objective, random() % kLinkNames.size());
      if (!objective.link.traits().of_log_ratio) {
        for (T& each : batch.logps) each = -std::abs(each);
      }
      objective.score = PairScore(random() % kPairScoreNames.size());
      objective.nll.mean = NllMean(random() % kNllMeanNames.size());
      objective.nll.coefficient = random() % 2 ? 0 : size_of_option<T>(random);
      if (!objective.loss.takes_labels()) objective.ld_alpha = random() % 2 ? 1 : 0.5;
      objective.beta = betas[random() % 6];
      const PairNormalizer normalizer{.world_size = factors[random() % 4],
                                      .scale = factors[random() % 4]};
      const PreferenceTotals out =
          preference_loss(sides.arrays(batch, objective), objective, normalizer,
                          {batch.dlogps.data(), dtype<T>(), 9, 1});
      const std::string where = std::string(row.name) + " " + text(trial) + ", beta " +
                                text(objective.beta) + ", factor " + text(normalizer.factor());
      EXPECT_FALSE(std::isnan(out.loss)) << where;
      for (const T each : batch.dlogps) EXPECT_FALSE(std::isnan(each)) << where;
      for (const double sum : out.metrics.sums) EXPECT_FALSE(std::isnan(sum)) << where;
    }
  }
}
TEST(FiniteInputs, GiveNoNaNAtTheEndsOfPreferenceOptionsInFloat) {
  expect_finite_at_the_ends_of_options<float>();
}
TEST(FiniteInputs, GiveNoNaNAtTheEndsOfPreferenceOptionsInDouble) {
  expect_finite_at_the_ends_of_options<double>();
}

TEST(FiniteInputs, GiveNoNaNInPreferenceLossesInFloat) { expect_finite_preference_losses<float>(); }
TEST(FiniteInputs, GiveNoNaNInPreferenceLossesInDouble) {
  expect_finite_preference_losses<double>();
}

template <class T>
void expect_finite_value_losses() {
  std::mt19937 random(9);
  for (int trial = 0; trial < 500; ++trial) {
    Batch<T> batch = wild_batch<T>(random);
    const ValueArrays arrays{.layout = {.rows = 4, .columns = 9},
                             .values = batch.view(batch.logps),
                             .returns = batch.view(batch.advantages),
                             .response_mask = batch.view(batch.mask),
                             .old_values = batch.view(batch.old_logps)};
    const ValueTotals out = value_loss(arrays, {}, {}, {batch.dlogps.data(), dtype<T>(), 9, 1});
    EXPECT_FALSE(std::isnan(out.loss)) << trial;
    for (const T each : batch.dlogps) EXPECT_FALSE(std::isnan(each)) << trial;
  }
}
template <class T>
void expect_finite_value_losses_of_any_factor() {
  std::mt19937 random(11);
  const double factors[] = {5e-324, 1, 1e30, largest_finite};
  for (int trial = 0; trial < 200; ++trial) {
    Batch<T> batch = wild_batch<T>(random);
    const ValueArrays arrays{.layout = {.rows = 4, .columns = 9},
                             .values = batch.view(batch.logps),
                             .returns = batch.view(trial % 2 ? batch.logps : batch.advantages),
                             .response_mask = batch.view(batch.mask),
                             .old_values = batch.view(batch.old_logps)};
    const Normalizer normalizer{.world_size = factors[random() % 4],
                                .scale = factors[random() % 4]};
    const ValueTotals out =
        value_loss(arrays, {}, normalizer, {batch.dlogps.data(), dtype<T>(), 9, 1});
    EXPECT_FALSE(std::isnan(out.loss)) << trial << " factor " << normalizer.factor();
    for (const T each : batch.dlogps) EXPECT_FALSE(std::isnan(each)) << trial;
  }
}
TEST(FiniteInputs, GiveNoNaNInValueLossesOfAnyFactorInFloat) {
  expect_finite_value_losses_of_any_factor<float>();
}
TEST(FiniteInputs, GiveNoNaNInValueLossesOfAnyFactorInDouble) {
  expect_finite_value_losses_of_any_factor<double>();
}

TEST(FiniteInputs, GiveNoNaNInValueLossesInFloat) { expect_finite_value_losses<float>(); }
TEST(FiniteInputs, GiveNoNaNInValueLossesInDouble) { expect_finite_value_losses<double>(); }

}  // namespace
}  // namespace tether
