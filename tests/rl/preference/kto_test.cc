#include "rl/preference/kto.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/preference/dpo.h"
#include "tests/error_message.h"
#include "tests/rl/preference_batch.h"

namespace tether {
namespace {

// Answers of one token with these log-ratios.
PairRows<double> batch_of(std::vector<double> log_ratios, std::vector<double> labels) {
  PairRows<double> out(0, 1);
  out.rows = static_cast<int64_t>(labels.size());
  out.mask.assign(labels.size(), 1);
  out.ref_logps.assign(labels.size(), -4);
  out.dlogps.assign(labels.size(), 0);
  for (const double each : log_ratios) out.logps.push_back(each - 4);
  out.labels = std::move(labels);
  return out;
}

// u = +-log 3: sigmoid(u) = 3/4 or 1/4, and sigmoid(u) sigmoid(-u) = 3/16.
TEST(Kto, IsTheLossOfThePaperByHand) {
  const double log3 = std::log(3);
  PairRows<double> batch = batch_of({2 * log3, -2 * log3, 2 * log3}, {1, 1, 0});
  const PreferenceTotals out = batch.run(presets::kto(0.5));
  EXPECT_DOUBLE_EQ(out.loss, (0.25 + 0.75 + 0.75) / 3);
  EXPECT_NEAR(batch.dlogps[0], -0.5 * 3 / 16 / 3, 1e-16);
  EXPECT_NEAR(batch.dlogps[1], -0.5 * 3 / 16 / 3, 1e-16);
  EXPECT_NEAR(batch.dlogps[2], +0.5 * 3 / 16 / 3, 1e-16);
}

TEST(Kto, ScoresAreComparedWithTheBaseline) {
  PairRows<double> batch = batch_of({2, 2}, {1, 0});
  batch.baselines = {2, 2};
  EXPECT_DOUBLE_EQ(batch.run(presets::kto()).loss, 0.5);
}

TEST(Kto, EachClassHasItsWeight) {
  PairRows<double> batch = batch_of({0, 0, 0}, {1, 0, 0});
  PreferenceObjective objective = presets::kto();
  objective.loss = KahnemanTversky{.desirable_weight = 3, .undesirable_weight = 0.5};
  EXPECT_DOUBLE_EQ(batch.run(objective).loss, (1.5 + 0.25 + 0.25) / 3);
  batch.answer_weights = {0, 2, 2};
  EXPECT_DOUBLE_EQ(batch.run(objective).loss, (0.5 + 0.5) / 3);
}

TEST(Kto, MetricsAreOfEachClass) {
  PairRows<double> batch = batch_of({3, 1, -2}, {1, 1, 0});
  const auto metrics = batch.run(presets::kto(0.5)).metrics.to_map();
  EXPECT_DOUBLE_EQ(metrics.at("reward_chosen"), 1);
  EXPECT_DOUBLE_EQ(metrics.at("reward_rejected"), -1);
  EXPECT_DOUBLE_EQ(metrics.at("margin"), 2);
  EXPECT_EQ(metrics.at("accuracy"), 0);
  EXPECT_DOUBLE_EQ(metrics.at("logp_chosen"), -2);
  EXPECT_EQ(metrics.at("pairs"), 3);
}

TEST(Kto, ALabelOfOneHalfIsNotGood) {
  PairRows<double> batch = batch_of({3}, {0.5});
  EXPECT_DOUBLE_EQ(batch.run(presets::kto()).metrics.to_map().at("reward_rejected"), 0.3);
  EXPECT_GT(batch.dlogps[0], 0);
}

TEST(Kto, AnswersWithoutTokensAreNotCounted) {
  PairRows<double> batch = batch_of({0, 5, 0}, {1, 7, 0});
  batch.mask[1] = 0;
  EXPECT_EQ(local_counts(batch.arrays()).pairs, 2);
  EXPECT_DOUBLE_EQ(batch.run(presets::kto()).loss, 0.5);
}

TEST(Kto, LabelsAndWeightsGetOneClearError) {
  const auto error = [](auto change) {
    PairRows<double> batch = batch_of({0, 0, 0}, {1, 0, 1});
    PreferenceObjective objective = presets::kto();
    change(batch, objective);
    return message([&] { batch.run(objective); });
  };
  using B = PairRows<double>;
  using O = PreferenceObjective;
  const std::string name = "preference_loss: ";
  EXPECT_EQ(error([](B& b, O&) { b.labels[1] = 2; }),
            name + "labels must be in [0, 1], got 2 at [1]");
  EXPECT_EQ(error([](B& b, O&) { b.labels[1] = NAN; }),
            name + "labels must be in [0, 1], got nan at [1]");
  EXPECT_EQ(error([](B& b, O&) { b.answer_weights = {1, 1, -1}; }),
            name + "answer_weights must be at least 0 and finite, got -1 at [2]");
  EXPECT_EQ(error([](B& b, O&) { b.labels.clear(); }),
            name +
                "logps must have an even number of rows, chosen answers before rejected ones, "
                "got 3");
  EXPECT_EQ(error([](B&, O& o) { o.ld_alpha = 0.5; }),
            name +
                "ld_alpha must be 1 for single answers, got 0.5. It compares the lengths of a "
                "pair");
  EXPECT_EQ(error([](B&, O& o) { o = presets::dpo(); }),
            name + "labels must be absent, got an array. The loss is one of pairs");
  EXPECT_EQ(error([](B& b, O&) {
              b.rows = 2;
              b.labels.clear();
            }),
            name + "labels must be given, got none. The loss is one of single answers");
}

}  // namespace
}  // namespace tether
