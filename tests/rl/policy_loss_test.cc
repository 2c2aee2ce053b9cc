#include "rl/kernels/policy_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "rl/catalogue.h"
#include "tests/error_message.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

TEST(PolicyLoss, EntropyIsAveragedLikeTheSurrogateAndEarnsItsCoefficient) {
  Batch<double> batch = random_batch<double>(3, 300);
  std::vector<double> entropies(900), dentropies(900, kNaN);
  double n[3] = {}, sum[3] = {};
  for (size_t i = 0; i < 900; ++i) {
    const bool active = batch.mask[i] != 0;
    entropies[i] = active ? 0.5 + 0.001 * double(i) : kNaN;
    n[i / 300] += active;
    if (active) sum[i / 300] += entropies[i];
  }
  PolicyObjective objective = presets::grpo(0);
  const double without = batch.run(objective).loss;
  objective.entropy.coefficient = 0.25;
  PolicyArrays arrays = batch.arrays();
  arrays.entropies = batch.view(entropies);
  const MutableArray dlogps{batch.dlogps.data(), DType::float64, 300, 1};
  const MutableArray into{dentropies.data(), DType::float64, 300, 1};
  const std::vector<double> gradient = batch.dlogps;
  const PolicyTotals out = policy_loss(arrays, objective, {.world_size = 2}, {dlogps, into});
  const double mean = (sum[0] / n[0] + sum[1] / n[1] + sum[2] / n[2]) / 3;
  EXPECT_NEAR(out.loss, 2 * (without - 0.25 * mean), 1e-14);
  EXPECT_NEAR(out.metrics.to_map().at("entropy"), (sum[0] + sum[1] + sum[2]) / (n[0] + n[1] + n[2]),
              1e-14);
  EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 0);
  for (size_t i = 0; i < 900; ++i) {
    EXPECT_DOUBLE_EQ(dentropies[i], batch.mask[i] == 0 ? 0 : -2 * 0.25 / 3 / n[i / 300]);
    EXPECT_DOUBLE_EQ(batch.dlogps[i], 2 * gradient[i]);
  }
}

TEST(PolicyLoss, MetricsMatchBruteForce) {
  Batch<double> batch = random_batch<double>(7, 700);
  PolicyObjective objective =
      presets::grpo(0.1, {.epsilon_low = 0.1, .epsilon_high = 0.3, .dual_clip = 1.4});
  const auto metrics = batch.run(objective).metrics.to_map();
  double n = 0, low = 0, high = 0, dual = 0, k1s = 0, k3s = 0, w = 0, w2 = 0, kls = 0, most = 0,
         least = 1e9;
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    if (batch.mask[i] == 0) continue;
    const double d = batch.logps[i] - batch.old_logps[i], ratio = std::exp(d);
    const double A = batch.advantages[i], to_ref = batch.ref_logps[i] - batch.logps[i];
    n += 1;
    low += A < 0 && ratio < 0.9;
    high += A > 0 && ratio > 1.3;
    dual += A < 0 && ratio > 1.4;
    k1s -= d;
    k3s += std::expm1(d) - d;
    kls += std::expm1(to_ref) - to_ref;
    w += ratio;
    w2 += ratio * ratio;
    most = std::max(most, ratio);
    least = std::min(least, ratio);
  }
  EXPECT_EQ(metrics.at("tokens"), n);
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_low"), low / n);
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_high"), high / n);
  EXPECT_DOUBLE_EQ(metrics.at("clip_fraction_dual"), dual / n);
  EXPECT_GT(dual, 0);
  EXPECT_NEAR(metrics.at("approx_kl_k1"), k1s / n, 1e-14);
  EXPECT_NEAR(metrics.at("approx_kl_k3"), k3s / n, 1e-14);
  EXPECT_NEAR(metrics.at("kl"), kls / n, 1e-14);
  EXPECT_NEAR(metrics.at("ratio_mean"), w / n, 1e-13);
  EXPECT_NEAR(metrics.at("ess"), w * w / w2 / n, 1e-13);
  EXPECT_NEAR(metrics.at("ratio_max"), most, 1e-13);
  EXPECT_NEAR(metrics.at("ratio_min"), least, 1e-13);
  EXPECT_EQ(metrics.at("nonfinite"), 0);
}

TEST(PolicyLoss, MergedMetricsOfPartsAreThoseOfTheWhole) {
  Batch<double> whole = random_batch<double>(6, 50);
  PolicyMetrics merged;
  for (int64_t row = 0; row < 6; ++row) {
    PolicyArrays part = whole.arrays();
    part.layout.rows = 1;
    for (ConstArray* array :
         {&part.logps, &part.old_logps, &part.ref_logps, &part.advantages, &part.response_mask}) {
      array->data = static_cast<const double*>(array->data) + row * 50;
    }
    merged.merge(policy_loss(part, presets::grpo(0.04), {}, {}).metrics);
  }
  const auto expected = whole.run(presets::grpo(0.04)).metrics.to_map();
  for (const auto& [name, value] : merged.to_map()) {
    EXPECT_NEAR(value, expected.at(name), 1e-13) << name;
  }
}

TEST(PolicyLoss, NonfiniteTokensAreCountedAndComeOut) {
  Batch<float> batch = random_batch<float>(3, 40);
  for (auto& weight : batch.mask) weight = 1;
  batch.logps[3] = std::nanf("");
  batch.old_logps[50] = INFINITY;
  batch.advantages[77] = -INFINITY;
  const PolicyTotals out = batch.run(presets::ppo());
  EXPECT_EQ(out.metrics.to_map().at("nonfinite"), 3);
  EXPECT_TRUE(std::isnan(out.loss));
  EXPECT_TRUE(std::isnan(batch.dlogps[3]));
  EXPECT_TRUE(std::isfinite(batch.dlogps[4]));
}

TEST(PolicyLoss, AnInfinityAtAnActiveSlotIsNaNThoughRatiosSaturate) {
  for (float infinite : {INFINITY, -INFINITY}) {
    for (int array = 0; array < 4; ++array) {
      Batch<float> batch = random_batch<float>(3, 40);
      batch.mask[50] = 1;
      (array == 0   ? batch.logps
       : array == 1 ? batch.old_logps
       : array == 2 ? batch.ref_logps
                    : batch.advantages)[50] = infinite;
      for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean,
                                     RatioLevel::sequence_token, RatioLevel::sequence_sum}) {
        PolicyObjective objective = presets::grpo(0.04);
        objective.level = level;
        const std::string where = text(array) + " " + text(infinite) + " " +
                                  std::string(kRatioLevelNames[static_cast<size_t>(level)]);
        EXPECT_TRUE(std::isnan(batch.run(objective).loss)) << where;
        EXPECT_TRUE(std::isnan(batch.dlogps[50])) << where;
      }
    }
  }
}

TEST(PolicyLoss, MetricsOfATokenThatRanAwayAreNotNaN) {
  Batch<double> batch = random_batch<double>(3, 40);
  batch.mask[50] = 1;
  batch.old_logps[50] = -5000;  // the square of its saturated ratio is infinite
  for (const auto& [name, value] : batch.run(presets::ppo()).metrics.to_map()) {
    EXPECT_FALSE(std::isnan(value)) << name;
  }
}

TEST(PolicyLoss, PackedRowsGiveTheBitsOfPaddedOnes) {
  Batch<float> padded = random_batch<float>(5, 30);
  const int64_t lengths[] = {30, 0, 1, 17, 29};
  std::vector<float> packed[6];
  std::vector<int64_t> offsets{0};
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t t = 0; t < 30; ++t) {
      const size_t at = size_t(row * 30 + t);
      if (t >= lengths[row]) {
        padded.mask[at] = 0;
        continue;
      }
      const float* columns[] = {&padded.logps[at],     &padded.old_logps[at],
                                &padded.ref_logps[at], &padded.advantages[at],
                                &padded.mask[at],      &padded.rollout_logps[at]};
      for (int i = 0; i < 6; ++i) packed[i].push_back(*columns[i]);
    }
    offsets.push_back(int64_t(packed[0].size()));
  }
  const auto view = [](const std::vector<float>& array) {
    return ConstArray{array.data(), DType::float32, 0, 1};
  };
  const PolicyArrays arrays{.layout = {.rows = 5, .offsets64 = offsets.data()},
                            .logps = view(packed[0]),
                            .advantages = view(packed[3]),
                            .response_mask = view(packed[4]),
                            .old_logps = view(packed[1]),
                            .ref_logps = view(packed[2]),
                            .rollout_logps = view(packed[5])};
  for (const CatalogueRow& row : kCatalogue) {
    std::vector<float> dlogps(packed[0].size());
    const PolicyTotals out =
        policy_loss(arrays, row.preset(), {}, {.logps = {dlogps.data(), DType::float32, 0, 1}});
    EXPECT_EQ(out.loss, padded.run(row.preset()).loss) << row.name;
    for (int64_t i = 0; i < 5; ++i) {
      EXPECT_EQ(0, std::memcmp(&dlogps[size_t(offsets[size_t(i)])], &padded.dlogps[size_t(i * 30)],
                               size_t(lengths[i]) * sizeof(float)))
          << row.name << " row " << i;
    }
  }
}

TEST(PolicyLoss, CountsOfTheStepMakeAnySplitTheSame) {
  Batch<double> batch = random_batch<double>(4, 25);
  for (size_t i = 0; i < 25; ++i) batch.mask[i] = 0;  // one empty row
  for (Aggregation aggregation : {token_mean(), sequence_mean_token_mean(),
                                  sequence_mean_token_sum(), sequence_sum_over_constant(25)}) {
    PolicyObjective objective = presets::grpo(0.3);
    objective.aggregation = aggregation;
    const double whole = batch.run(objective).loss;
    const std::vector<double> gradient = batch.dlogps;
    const Normalizer counts = local_counts(batch.arrays(), objective);
    EXPECT_EQ(counts.sequences, 3);
    double sum = 0;
    for (int64_t row = 0; row < 4; ++row) {
      Batch<double> part(1, 25);
      const auto cut = [&](const std::vector<double>& from) {
        return std::vector<double>(from.begin() + row * 25, from.begin() + (row + 1) * 25);
      };
      part.logps = cut(batch.logps);
      part.old_logps = cut(batch.old_logps);
      part.ref_logps = cut(batch.ref_logps);
      part.advantages = cut(batch.advantages);
      part.mask = cut(batch.mask);
      sum += part.run(objective, counts).loss;
      for (size_t t = 0; t < 25; ++t) {
        EXPECT_DOUBLE_EQ(part.dlogps[t], gradient[size_t(row) * 25 + t]);
      }
    }
    EXPECT_NEAR(sum, whole, 1e-15);
  }
}

TEST(PolicyLoss, TwoTokensOfHalfWeightAreOneOfWeightOne) {
  const Batch<double> single = random_batch<double>(3, 20);
  Batch<double> twice(3, 40);
  for (size_t i = 0; i < twice.mask.size(); ++i) {
    twice.logps[i] = single.logps[i / 2];
    twice.old_logps[i] = single.old_logps[i / 2];
    twice.ref_logps[i] = single.ref_logps[i / 2];
    twice.rollout_logps[i] = single.rollout_logps[i / 2];
    twice.advantages[i] = single.advantages[i / 2];
    twice.mask[i] = single.mask[i / 2] / 2;
  }
  for (const CatalogueRow& row : kCatalogue) {
    Batch<double> once = single;
    EXPECT_NEAR(twice.run(row.preset()).loss, once.run(row.preset()).loss, 1e-14) << row.name;
    for (size_t i = 0; i < once.dlogps.size(); ++i) {
      EXPECT_NEAR(2 * twice.dlogps[2 * i], once.dlogps[i], 1e-14) << row.name;
    }
  }
}

TEST(PolicyLoss, NothingActiveIsZero) {
  Batch<float> batch(3, 5);
  for (auto& each : batch.logps) each = std::nanf("");
  for (const CatalogueRow& row : kCatalogue) {
    const PolicyTotals out = batch.run(row.preset());
    EXPECT_EQ(out.loss, 0) << row.name;
    for (float each : batch.dlogps) EXPECT_EQ(each, 0) << row.name;
    for (const auto& [name, value] : out.metrics.to_map()) EXPECT_EQ(value, 0) << name;
  }
  Batch<float> none(0, 5);
  EXPECT_EQ(none.run(presets::grpo()).loss, 0);
}

TEST(PolicyLoss, BadInputGetsOneClearErrorBeforeAnythingIsWritten) {
  Batch<float> batch = random_batch<float>(3, 6);
  for (auto& weight : batch.mask) weight = 1;
  const auto error = [&](const PolicyObjective& objective, const Normalizer& normalizer = {}) {
    batch.dlogps.assign(18, 7.0f);
    const std::string out = message([&] { batch.run(objective, normalizer); });
    EXPECT_EQ(batch.dlogps, std::vector<float>(18, 7.0f)) << out;
    return out;
  };
  EXPECT_EQ(error(presets::ppo({.epsilon_low = 1.2})),
            "policy_loss: epsilon_low must be in [0, 1], got 1.2");
  EXPECT_EQ(error(presets::grpo(-1)), "policy_loss: beta must be in [0, 1e+12], got -1");
  for (const double count : {0.0, -1.0, double(kNaN), double(INFINITY)}) {
    const std::string rule = " must be greater than 0 and finite, got " + text(count);
    // A count of 0 is legal where this batch has no tokens.
    const std::string of_count =
        count == 0 ? rule : " must be at least 0 and finite, got " + text(count);
    EXPECT_EQ(error(presets::ppo(), {.policy = count}),
              "policy_loss: normalizer.policy" + of_count);
    EXPECT_EQ(error(presets::ppo(), {.policy = 1, .kl = count}),
              "policy_loss: normalizer.kl" + of_count);
    EXPECT_EQ(error(presets::ppo(), {.policy = 1, .sequences = count}),
              "policy_loss: normalizer.sequences" + of_count);
    EXPECT_EQ(error(presets::ppo(), {.world_size = count}),
              "policy_loss: normalizer.world_size" + rule);
    EXPECT_EQ(error(presets::ppo(), {.scale = count}), "policy_loss: normalizer.scale" + rule);
  }
  EXPECT_EQ(
      error(presets::ppo(), {.policy = 5e-324}),
      "policy_loss: normalizer.policy must be at least 1.17549e-38 and finite, got 4.94066e-324");
  batch.mask[11] = -1;
  EXPECT_EQ(error(presets::ppo()),
            "policy_loss: response_mask must be in [0, 1], got -1 at [1, 5]");
  batch.mask[11] = std::nanf("");
  EXPECT_EQ(error(presets::ppo()),
            "policy_loss: response_mask must be in [0, 1], got nan at [1, 5]");
  batch.mask[11] = 1.5;
  EXPECT_EQ(error(presets::ppo()),
            "policy_loss: response_mask must be in [0, 1], got 1.5 at [1, 5]");

  batch.mask[11] = 1;
  PolicyArrays arrays = batch.arrays();
  arrays.ref_logps = {};
  EXPECT_EQ(message([&] { policy_loss(arrays, presets::grpo(0.04), {}, {}); }),
            "policy_loss: ref_logps must be given when beta is greater than 0, got beta 0.04 and "
            "none. Pass ref_logps or beta = 0");
  const auto array_error = [&](auto change) {
    PolicyArrays changed = batch.arrays();
    MutableArray dlogps;
    change(changed, dlogps);
    return message([&] { policy_loss(changed, presets::ppo(), {}, {.logps = dlogps}); });
  };
  using A = PolicyArrays;
  using M = MutableArray;
  EXPECT_EQ(array_error([](A& a, M&) { a.logps = {}; }),
            "policy_loss: logps must be given, got none");
  EXPECT_EQ(array_error([](A& a, M&) { a.advantages = {}; }),
            "policy_loss: advantages must be given, got none");
  EXPECT_EQ(array_error([](A& a, M&) { a.response_mask = {}; }),
            "policy_loss: response_mask must be given, got none");
  EXPECT_EQ(array_error([](A& a, M&) { a.old_logps.dtype = DType::none; }),
            "policy_loss: old_logps must have a dtype, got none");
  EXPECT_EQ(array_error([](A& a, M&) { a.ref_logps.data = nullptr; }),
            "policy_loss: ref_logps must point to 18 elements, got null");
  EXPECT_EQ(array_error([](A&, M& d) { d.dtype = DType::float32; }),
            "policy_loss: dlogps must point to 18 elements, got null");
  PolicyObjective entropic = presets::ppo();
  entropic.entropy.coefficient = 0.01;
  EXPECT_EQ(message([&] { policy_loss(batch.arrays(), entropic, {}, {}); }),
            "policy_loss: entropies must be given when entropy_coef is not 0, got entropy_coef "
            "0.01 and none. Pass entropies or entropy_coef = 0");
  EXPECT_EQ(array_error([](A& a, M&) { a.layout.rows = -1; }),
            "policy_loss: rows and columns must be at least 0, got -1 and 6");
  const int64_t offsets[] = {0, 7, 5, 18};
  arrays.layout = {.rows = 3, .offsets64 = offsets};
  EXPECT_EQ(message([&] { policy_loss(arrays, presets::ppo(), {}, {}); }),
            "policy_loss: offsets must not decrease, got 5 after 7 at [2]");
}

}  // namespace
}  // namespace tether
