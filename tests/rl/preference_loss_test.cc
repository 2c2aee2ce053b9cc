#include "rl/kernels/preference_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "rl/catalogue.h"
#include "tests/error_message.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Pairs of ragged answers; masked slots hold NaN.
template <class T>
struct Batch {
  int64_t rows, columns;
  std::vector<T> logps, ref_logps, mask, dlogps;

  Batch(int64_t pairs, int64_t t, unsigned seed = 1, double spread = 0.3)
      : rows(2 * pairs), columns(t) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows * t; ++i) {
      mask.push_back(random() % 4 != 0 ? T(1) : T(0));
      const bool active = mask.back() != 0;
      const double logp = -1 - std::abs(normal(random));
      logps.push_back(active ? T(logp) : T(kNaN));
      ref_logps.push_back(active ? T(logp + spread * normal(random)) : T(kNaN));
    }
    dlogps.assign(logps.size(), T(kNaN));
  }
  ConstArray view(const std::vector<T>& array) const {
    return {array.data(), sizeof(T) == 8 ? DType::float64 : DType::float32, columns, 1};
  }
  PreferenceArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .logps = view(logps),
            .ref_logps = view(ref_logps),
            .response_mask = view(mask)};
  }
  PreferenceTotals run(const PreferenceObjective& objective, const PairNormalizer& normalizer = {},
                       const Executor& executor = {}) {
    return preference_loss(arrays(), objective, normalizer,
                           {dlogps.data(), view(logps).dtype, columns, 1}, executor);
  }
  // Sum or mean of a row's log-ratios, in double.
  double score(int64_t row, bool mean) const {
    double sum = 0, n = 0;
    for (int64_t t = 0; t < columns; ++t) {
      const size_t i = size_t(row * columns + t);
      if (mask[i] == 0) continue;
      sum += double(logps[i]) - double(ref_logps[i]);
      n += 1;
    }
    return mean ? sum / n : sum;
  }
};

// The published formulas once more, from the scores.
double by_hand(std::string_view name, double chosen, double rejected, double beta) {
  const double x = beta * (chosen - rejected);
  if (name == "dpo") return std::log1p(std::exp(-x));
  if (name == "cdpo") return 0.9 * std::log1p(std::exp(-x)) + 0.1 * std::log1p(std::exp(x));
  if (name == "ipo") return std::pow(chosen - rejected - 1 / (2 * beta), 2);
  if (name == "hinge") return std::max(0.0, 1 - x);
  return kNaN;
}

TEST(PreferenceLoss, EveryRowIsItsFormula) {
  const Batch<double> batch(5, 300);
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    const PreferenceObjective objective = row.preset();
    double expected = 0;
    for (int64_t i = 0; i < 5; ++i) {
      const bool mean = objective.score == PairScore::mean;
      expected += by_hand(row.name, batch.score(i, mean), batch.score(i + 5, mean), 0.1) / 5;
    }
    EXPECT_NEAR(Batch<double>(batch).run(objective).loss, expected, 1e-13) << row.name;
    const Batch<float> narrow(5, 300);
    EXPECT_NEAR(Batch<float>(narrow).run(objective).loss, expected, 1e-4) << row.name;
  }
}

TEST(PreferenceLoss, TheGradientIsTheDerivative) {
  for (const Link link : {Link::reverse_kl, Link::forward_kl, Link::js}) {
    for (const PreferenceRow& row : kPreferenceCatalogue) {
      PreferenceObjective objective = row.preset();
      objective.link = link;
      objective.beta = 0.3;
      Batch<double> batch(3, 7);
      batch.run(objective);
      const std::vector<double> gradient = batch.dlogps;
      for (size_t i = 0; i < gradient.size(); ++i) {
        const double logp = batch.logps[i], h = 1e-6;
        batch.logps[i] = logp + h;
        const double up = batch.run(objective).loss;
        batch.logps[i] = logp - h;
        const double down = batch.run(objective).loss;
        batch.logps[i] = logp;
        const double expected = batch.mask[i] == 0 ? 0 : (up - down) / (2 * h);
        EXPECT_NEAR(gradient[i], expected, 1e-8 * (1 + std::abs(expected)))
            << row.name << " " << kLinkNames[size_t(link)] << " " << i;
      }
    }
  }
}

TEST(PreferenceLoss, MetricsAreThoseOfTheScores) {
  Batch<double> batch(4, 50);
  const auto metrics = batch.run(presets::dpo(0.2)).metrics.to_map();
  double chosen = 0, rejected = 0, right = 0;
  for (int64_t i = 0; i < 4; ++i) {
    const double a = 0.2 * batch.score(i, false), b = 0.2 * batch.score(i + 4, false);
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

// One pair at a time, with the count of the step, and packed instead of padded.
TEST(PreferenceLoss, AnySplitAndPackingGivesTheSame) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    Batch<double> whole(3, 40);
    for (int64_t t = 0; t < 40; ++t) {  // pair 1 is padding
      whole.mask[size_t(1 * 40 + t)] = whole.mask[size_t(4 * 40 + t)] = 0;
    }
    const PreferenceTotals out = whole.run(row.preset());
    EXPECT_EQ(out.metrics.to_map().at("pairs"), 2);
    const PairNormalizer counts = local_counts(whole.arrays());
    double sum = 0;
    for (int64_t pair = 0; pair < 3; ++pair) {
      // Chosen and rejected lie 3 rows apart: a view with that row stride.
      PreferenceArrays part = whole.arrays();
      part.layout.rows = 2;
      for (ConstArray* array : {&part.logps, &part.ref_logps, &part.response_mask}) {
        array->data = static_cast<const double*>(array->data) + pair * 40;
        array->row_stride = 3 * 40;
      }
      std::vector<double> dlogps(80);
      sum +=
          preference_loss(part, row.preset(), counts, {dlogps.data(), DType::float64, 40, 1}).loss;
      for (size_t t = 0; t < 40; ++t) {
        EXPECT_EQ(dlogps[t], whole.dlogps[size_t(pair) * 40 + t]) << row.name;
        EXPECT_EQ(dlogps[40 + t], whole.dlogps[size_t(pair + 3) * 40 + t]) << row.name;
      }
    }
    EXPECT_NEAR(sum, out.loss, 1e-15) << row.name;

    std::vector<int64_t> offsets{0};
    for (int64_t i = 1; i <= 6; ++i) offsets.push_back(40 * i);
    PreferenceArrays packed = whole.arrays();
    packed.layout = {.rows = 6, .offsets64 = offsets.data()};
    EXPECT_EQ(preference_loss(packed, row.preset(), {}, {}).loss, out.loss) << row.name;
  }
}

// Whatever masked slots hold, seven more columns of them, and any strides: the same bits.
TEST(PreferenceLoss, PoisonPaddingAndStridesChangeNoBit) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    Batch<double> batch(3, 11);
    const PreferenceTotals want = batch.run(row.preset());
    for (double poison : {kNaN, infinity, -infinity, 1e30, -1e4, 0.0}) {
      constexpr int64_t kColumns = 18, kStep = 2, kRowStep = kColumns * kStep + 5;
      const auto size = size_t(batch.rows * kRowStep);
      std::vector<double> logps(size, poison), ref_logps(size, poison), mask(size, kNaN),
          dlogps(size, 7);
      for (int64_t i = 0; i < batch.rows; ++i) {
        for (int64_t t = 0; t < kColumns; ++t) {
          const size_t to = size_t(i * kRowStep + t * kStep);
          const bool inside = t < batch.columns;
          const size_t from = size_t(i * batch.columns + (inside ? t : 0));
          mask[to] = inside ? batch.mask[from] : 0;
          if (mask[to] == 0) continue;
          logps[to] = batch.logps[from];
          ref_logps[to] = batch.ref_logps[from];
        }
      }
      const auto view = [&](const std::vector<double>& array) {
        return ConstArray{array.data(), DType::float64, kRowStep, kStep};
      };
      const PreferenceArrays arrays{.layout = {.rows = batch.rows, .columns = kColumns},
                                    .logps = view(logps),
                                    .ref_logps = view(ref_logps),
                                    .response_mask = view(mask)};
      const PreferenceTotals got = preference_loss(
          arrays, row.preset(), {}, {dlogps.data(), DType::float64, kRowStep, kStep});
      EXPECT_EQ(got.loss, want.loss) << row.name << ", " << poison;
      EXPECT_EQ(got.metrics.sums, want.metrics.sums) << row.name;
      for (int64_t i = 0; i < batch.rows; ++i) {
        for (int64_t t = 0; t < kColumns; ++t) {
          const size_t at = size_t(i * kRowStep + t * kStep);
          const bool inside = t < batch.columns;
          const double expected = inside ? batch.dlogps[size_t(i * batch.columns + t)] : 0;
          ASSERT_EQ(dlogps[at], expected) << row.name;
          ASSERT_EQ(dlogps[at + 1], 7) << row.name;  // between the slots nothing is written
        }
      }
    }
  }
}

TEST(PreferenceLoss, SameBitsInAnyOrderOfItsChunks) {
  const Executor backwards{.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    for (int64_t i = tasks - 1; i >= 0; --i) task(argument, i);
  }};
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    Batch<float> batch(20, 1500);
    const PreferenceTotals serial = batch.run(row.preset());
    const std::vector<float> gradient = batch.dlogps;
    EXPECT_EQ(batch.run(row.preset(), {}, backwards).loss, serial.loss);
    EXPECT_EQ(batch.dlogps, gradient);
  }
}

TEST(PreferenceLoss, RunawaysAreFiniteAndPulledBack) {
  for (const Link link : {Link::reverse_kl, Link::forward_kl, Link::js}) {
    for (const PreferenceRow& row : kPreferenceCatalogue) {
      PreferenceObjective objective = row.preset();
      objective.link = link;
      for (const double size : {10.0, 1e3, 1e6}) {
        Batch<float> batch(1, 4, 1, 0);
        for (size_t i = 0; i < 8; ++i) {
          batch.mask[i] = 1;
          batch.logps[i] = 0;
          batch.ref_logps[i] = float(i < 4 ? size : -size);  // the rejected one is preferred
        }
        EXPECT_TRUE(std::isfinite(batch.run(objective).loss)) << row.name << size;
        for (float each : batch.dlogps) EXPECT_TRUE(std::isfinite(each)) << row.name << size;
        if (link == Link::reverse_kl) {
          EXPECT_LT(batch.dlogps[0], 0) << row.name;
          EXPECT_GT(batch.dlogps[4], 0) << row.name;
        }
      }
    }
  }
}

TEST(PreferenceLoss, InfinitiesComeOutAsNaNAndAreCounted) {
  Batch<float> batch(3, 5);
  for (float& weight : batch.mask) weight = 1;
  batch = Batch<float>(3, 5);
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
  Batch<double> batch(1, 9);
  const double x = 0.1 * (batch.score(0, false) - batch.score(1, false));
  EXPECT_NEAR(batch.run(objective).loss, 1 / (1 + std::exp(x)), 1e-15);
  EXPECT_TRUE(objective.loss.target<SoftAccuracy>());
  EXPECT_FALSE(objective.loss.target<LogisticPair>());
}

TEST(PreferenceLoss, BadInputGetsOneClearErrorBeforeAnythingIsWritten) {
  const auto error = [](auto change) {
    Batch<float> batch(2, 3);
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
  using B = Batch<float>;
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
            name + "beta must be greater than 0 and finite, got 0");
  EXPECT_EQ(error([](B&, A&, O& o, N&) { o = presets::cdpo(0.1, 0.7); }),
            name + "label_smoothing must be in [0, 0.5], got 0.7");
  EXPECT_EQ(error([](B& b, A&, O&, N&) { b.mask[4] = 2; }),
            name + "response_mask must be in [0, 1], got 2 at [1, 1]");
  const std::string positive = " must be greater than 0 and finite, got 0";
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.pairs = 0; }), name + "normalizer.pairs" + positive);
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.world_size = 0; }),
            name + "normalizer.world_size" + positive);
  EXPECT_EQ(error([](B&, A&, O&, N& n) { n.scale = 0; }), name + "normalizer.scale" + positive);
  EXPECT_EQ(message([] { preference_preset("preference_loss", "dop"); }),
            name + "objective must be one of dpo, cdpo, ipo, hinge, got \"dop\"");
}

}  // namespace
}  // namespace tether
