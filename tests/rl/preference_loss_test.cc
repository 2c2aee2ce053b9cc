#include "rl/kernels/preference_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "rl/catalogue.h"
#include "tests/error_message.h"
#include "tests/rl/preference/pair_at.h"
#include "tests/rl/preference_batch.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

const nlohmann::json& golden() {
  static const auto json =
      nlohmann::json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/preference_golden.json"));
  return json;
}

// An error of one rounding in the gap is one of slope times gap in the loss, and ipo's slope is
// another.
TEST(PreferenceLoss, EveryPairFormulaMatchesItsGoldenValues) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    ASSERT_TRUE(golden()["pairs"].contains(std::string(row.name)))
        << "no golden values for " << row.name << ": add it to make_preference_golden.py";
    for (const auto& each : golden()["pairs"][std::string(row.name)]) {
      const double chosen = each[0], rejected = each[1], beta = each[2], loss = each[3];
      const double slope = each[4];
      // Of a single answer its label is in the place of the other score.
      const bool labelled = row.preset().loss.takes_labels();
      const auto got = row.preset().loss({pair_at(chosen, rejected, beta), {rejected}});
      const bool by_gap = !labelled && each.size() == 5;  // else with a slope by the other score
      const double size =
          by_gap ? std::abs(chosen - rejected) : std::abs(chosen) + std::abs(rejected);
      const double rounding = 2e-15 * (size + 1 / beta);
      const double other = by_gap || labelled ? 0 : std::abs(double(each[5]));
      EXPECT_NEAR(got.value, loss, 2e-15 * std::abs(loss) + rounding * (std::abs(slope) + other))
          << row.name << each;
      const auto expect_slope = [&](double grad, double expected) {
        EXPECT_NEAR(grad, expected, 2e-15 * std::abs(expected) + rounding * beta * beta)
            << row.name << each;
      };
      expect_slope(got.grad[0], slope);
      if (by_gap) {
        EXPECT_EQ(got.grad[1], -got.grad[0]) << row.name << each;
      } else {
        expect_slope(got.grad[1], labelled ? 0 : double(each[5]));
      }
    }
  }
}

TEST(PreferenceLoss, EveryPresetHasAGoldenBatch) {
  std::set<std::string> names;
  for (const auto& each : golden()["batches"]) {
    if (each["preset"]) names.insert(each["objective"]);
  }
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    EXPECT_TRUE(names.contains(std::string(row.name)))
        << "no golden batch for " << row.name << ": add it to make_preference_golden.py";
  }
}

PreferenceObjective objective_of(const nlohmann::json& golden_batch) {
  const nlohmann::json& each = golden_batch;
  PreferenceObjective out = preference_preset("test", each["objective"].get<std::string>());
  if (each["preset"]) return out;
  for (const auto& [name, value] : each["options"].items()) set_option("test", out, name, value);
  for (const auto& [name, value] : each["choices"].items()) {
    set_choice("test", out, name, std::string(value));
  }
  return out;
}

template <class T>
PairRows<T> batch_of(const nlohmann::json& golden_batch) {
  const nlohmann::json& each = golden_batch;
  PairRows<T> batch(0, each["columns"].get<int64_t>());
  batch.rows = each["rows"].get<int64_t>();
  const auto read = [&](const char* name, std::vector<T>& array) {
    if (each.contains(name)) array = each[name].get<std::vector<T>>();
  };
  read("response_mask", batch.mask);
  read("logps", batch.logps);
  read("ref_logps", batch.ref_logps);
  read("nll_mask", batch.nll_mask);
  read("labels", batch.labels);
  read("baselines", batch.baselines);
  read("answer_weights", batch.answer_weights);
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    if (batch.mask[i] != 0) continue;
    batch.ref_logps[i] = T(kNaN);
    if (batch.nll_mask.empty() || batch.nll_mask[i] == 0) batch.logps[i] = T(kNaN);
  }
  batch.dlogps.assign(batch.logps.size(), T(kNaN));
  return batch;
}

template <class T>
void expect_batch_goldens(double tolerance) {
  for (const auto& each : golden()["batches"]) {
    PairRows<T> batch = batch_of<T>(each);
    const double loss = each["loss"];
    EXPECT_NEAR(batch.run(objective_of(each)).loss, loss, 1e-15 * std::max(1.0, loss))
        << each["name"];
    for (size_t i = 0; i < batch.dlogps.size(); ++i) {
      const double slope = each["dlogps"][i];
      EXPECT_NEAR(batch.dlogps[i], slope, tolerance * std::max(1.0, std::abs(slope)))
          << each["name"] << " " << i;
    }
  }
}

TEST(PreferenceLoss, BatchesMatchTheirGoldenValuesInDouble) { expect_batch_goldens<double>(1e-15); }
// The inputs are multiples of 2^-10, sums are in double: only the gradient is rounded, to float.
TEST(PreferenceLoss, BatchesMatchTheirGoldenValuesInFloat) { expect_batch_goldens<float>(0x1p-24); }

TEST(PreferenceLoss, MetricsAreThoseOfTheScores) {
  PairRows<double> batch(4, 50);
  const auto metrics = batch.run(presets::dpo(0.2)).metrics.to_map();
  double chosen = 0, rejected = 0, right = 0;
  for (int64_t i = 0; i < 4; ++i) {
    const double a = 0.2 * batch.score(i), b = 0.2 * batch.score(i + 4);
    chosen += a / 4;
    rejected += b / 4;
    right += a > b;
  }
  EXPECT_NEAR(metrics.at("reward_chosen"), chosen, 1e-14);
  EXPECT_NEAR(metrics.at("reward_rejected"), rejected, 1e-14);
  EXPECT_NEAR(metrics.at("margin"), chosen - rejected, 1e-14);
  EXPECT_EQ(metrics.at("accuracy"), right / 4);
  EXPECT_EQ(metrics.at("pairs"), 4);
  EXPECT_EQ(metrics.at("nonfinite"), 0);
}

TEST(PreferenceLoss, PairsWithATokenAreCounted) {
  PairRows<double> batch(3, 40);
  for (size_t t = 0; t < 40; ++t)
    batch.mask[40 + t] = batch.mask[160 + t] = 0;          // pair 1 is padding
  for (size_t t = 0; t < 40; ++t) batch.mask[80 + t] = 0;  // pair 2 has no chosen tokens
  EXPECT_EQ(local_counts(batch.arrays()).pairs, 2);
  EXPECT_EQ(batch.run(presets::dpo()).metrics.to_map().at("pairs"), 2);
}

TEST(PreferenceLoss, InfinitiesComeOutAsNaNAndAreCounted) {
  PairRows<float> batch(3, 5);
  std::fill(batch.mask.begin(), batch.mask.end(), 1.0f);
  std::fill(batch.logps.begin(), batch.logps.end(), -1.0f);
  std::fill(batch.ref_logps.begin(), batch.ref_logps.end(), -1.5f);
  batch.ref_logps[2] = -INFINITY;
  const PreferenceTotals out = batch.run(presets::dpo());
  EXPECT_TRUE(std::isnan(out.loss));
  EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 1);
  EXPECT_TRUE(std::isnan(batch.dlogps[0]));
  EXPECT_TRUE(std::isfinite(batch.dlogps[5]));
}

TEST(PreferenceLoss, ABaselineThatIsNoNumberIsNaNAndCounted) {
  for (const size_t row : {size_t{0}, size_t{3}}) {
    PairRows<double> batch(2, 5);
    batch.mask.assign(20, 1);
    batch.logps.assign(20, -1);
    batch.ref_logps.assign(20, -2);
    batch.baselines.assign(4, 0);
    batch.baselines[row] = kNaN;
    const PreferenceTotals out = batch.run(presets::dpo());
    EXPECT_TRUE(std::isnan(out.loss)) << row;
    EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 1) << row;
  }
}

TEST(PreferenceLoss, TheLikelihoodIsOverTheTokensOfTheStep) {
  PairRows<double> batch(1, 2);
  batch.mask.assign(4, 1);
  batch.logps = {-1, -3, -2, -2};
  PreferenceObjective objective = presets::dpo();
  objective.reference = false;
  objective.loss_weight = 0;
  objective.nll.coefficient = 0.5;
  EXPECT_EQ(batch.run(objective, {.tokens = 8}).loss, 0.25);
  EXPECT_EQ(batch.dlogps, (std::vector<double>{-0.0625, -0.0625, 0, 0}));
  objective.nll.mean = NllMean::sequence_sum;
  EXPECT_EQ(batch.run(objective, {.pairs = 4, .tokens = 8}).loss, 0.5);
  EXPECT_EQ(*local_counts(batch.arrays()).tokens, 2);
}

// A user's own formula of a pair: 1 - sigmoid(x), the loss of apo and of ranking by accuracy.
struct SoftAccuracy {
  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return sigmoid(-pair.margin());
  }
};

TEST(PreferenceLoss, AUsersFormulaIsAValueLikeTheLibrarysOwn) {
  PreferenceObjective objective = presets::dpo();
  objective.loss = SoftAccuracy{};
  PairRows<double> batch(1, 9);
  const double x = 0.1 * (batch.score(0) - batch.score(1));
  EXPECT_NEAR(batch.run(objective).loss, 1 / (1 + std::exp(x)), 1e-15);
  EXPECT_TRUE(objective.loss.target<SoftAccuracy>());
  EXPECT_FALSE(objective.loss.target<LogisticPair>());
}

TEST(PreferenceLoss, BadInputGetsOneClearErrorBeforeAnythingIsWritten) {
  const auto error = [](auto change) {
    PairRows<float> batch(2, 3);
    PreferenceArrays arrays = batch.arrays();
    PreferenceObjective objective = presets::cdpo();
    PairNormalizer normalizer;
    change(batch, arrays, objective, normalizer);
    const MutableArray dlogps{batch.dlogps.data(), DType::float32, 3, 1};
    const std::string out =
        message([&] { preference_loss(arrays, objective, normalizer, dlogps); });
    EXPECT_TRUE(std::isnan(batch.dlogps[0])) << out;
    return out;
  };
  using B = PairRows<float>;
  using A = PreferenceArrays;
  using O = PreferenceObjective;
  using N = PairNormalizer;
  const std::string name = "preference_loss: ";
  EXPECT_EQ(error([](B&, A& a, O&, N&) { a.layout.rows = 3; }),
            name +
                "logps must have an even number of rows, chosen answers before rejected ones, "
                "got 3");
  EXPECT_EQ(error([](B&, A& a, O&, N&) { a.ref_logps = {}; }),
            name + "ref_logps must be given, got none. Pass them or reference = false");
  EXPECT_EQ(error([](B&, A& a, O&, N&) { a.logps = {}; }), name + "logps must be given, got none");
  EXPECT_EQ(error([](B&, A&, O& o, N&) { o.beta = 0; }),
            name + "beta must be in (0, 1e+12], got 0");
  EXPECT_EQ(error([](B&, A&, O& o, N&) { o = presets::cdpo(0.1, 0.7); }),
            name + "label_smoothing must be in [0, 0.5], got 0.7");
  EXPECT_EQ(error([](B& b, A&, O&, N&) { b.mask[4] = 2; }),
            name + "response_mask must be in [0, 1], got 2 at [1, 1]");
  const std::string positive = " must be greater than 0 and finite, got 0";
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.pairs = 0; }), name + "normalizer.pairs" + positive);
  EXPECT_EQ(error([](B&, A&, O& o, N& n) {
              o.nll.coefficient = 1;
              n.tokens = 0;
            }),
            name + "normalizer.tokens" + positive);
  EXPECT_EQ(error([](B&, A&, O& o, N& n) {
              o.nll.coefficient = 1;
              n.pairs = 4;
            }),
            name +
                "normalizer.tokens must be given where normalizer.pairs is, for a likelihood by "
                "tokens, got none");
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.world_size = 0; }),
            name + "normalizer.world_size" + positive);
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.scale = 0; }), name + "normalizer.scale" + positive);
}

}  // namespace
}  // namespace tether
