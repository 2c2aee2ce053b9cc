#include "tests/rl/policy_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/half.h"
#include "rl/catalogue.h"
#include "rl/kernels/policy_calls.h"
#include "rl/kernels/policy_loss.h"
#include "tests/rl/own_surrogate.h"
#include "tests/rl/policy_batch.h"

// The programs of the CUDA kernels on a team of host threads, in the order in which policy_loss.cu
// launches them, beside the CPU kernel.

namespace tether {
namespace {

TEST(PolicyProgram, EveryRowOfTheCatalogueIsThatOfTheCpuKernel) {
  Batch<float> batch = mixed_batch();
  spoil_masked(batch);
  for (const CatalogueRow& row : kCatalogue) {
    expect_cpu_kernel(batch, row.preset(), std::string(row.name));
  }
}

TEST(PolicyProgram, AFormulaOfAUsersIsThatOfTheCpuKernel) {
  Batch<float> batch = mixed_batch();
  spoil_masked(batch);
  for (const RatioLevel level :
       {RatioLevel::token, RatioLevel::sequence_mean, RatioLevel::sequence_token}) {
    PolicyObjective objective = presets::grpo(0.04);
    objective.surrogate = OwnSurrogate{.strength = 0.7};
    objective.level = level;
    expect_cpu_kernel(batch, objective, std::string(rule_of(level).name));
  }
}

TEST(PolicyProgram, EveryWeightIsThatOfTheCpuKernelAtEveryLevel) {
  Batch<float> batch = mixed_batch();
  spoil_masked(batch);
  for_each_weight([&](const auto& row) {
    for (const WeightLevel level :
         {WeightLevel::token, WeightLevel::sequence_mean, WeightLevel::sequence_sum,
          WeightLevel::sequence_min, WeightLevel::sequence_max}) {
      PolicyObjective objective = presets::grpo(0.04);
      objective.weights = {TokenWeight(row.defaults, level)};
      expect_cpu_kernel(batch, objective,
                        std::string(row.name) + " " + std::string(rule_of(level).name));
    }
  });
  PolicyObjective objective = presets::gspo();
  for (const WeightFormula& weight :
       {WeightFormula(RatioGate{}), WeightFormula(TvGate{}), WeightFormula(TruncatedImportance{}),
        WeightFormula(MaskedRatio{})}) {
    objective.weights.emplace_back(weight);
  }
  batch.token_weights.assign(batch.mask.size(), 0.75f);
  expect_cpu_kernel(batch, objective, "four weights and the caller's");
}

TEST(PolicyProgram, EveryPenaltyIsThatOfTheCpuKernel) {
  Batch<float> batch = mixed_batch();
  spoil_masked(batch);
  batch.kl_weights.assign(batch.mask.size(), 1.5f);
  for (const RatioLevel level :
       {RatioLevel::token, RatioLevel::sequence_mean, RatioLevel::sequence_token}) {
    for (size_t form = 0; form < kKlFormNames.size(); ++form) {
      for (size_t correction = 0; correction < kKlCorrectionNames.size(); ++correction) {
        PolicyObjective objective = presets::grpo(0.3);
        objective.level = level;
        objective.kl.allow_biased_gradient = true;
        objective.kl.ratio_high = 1.1;
        objective.kl.correction = static_cast<KlCorrection>(correction);
        choose(objective.kl.estimator, form);
        choose(objective.kl.gradient, (form + correction) % kKlFormNames.size());
        if (objective.kl.correction == KlCorrection::level_ratio && shares_ratio(level)) continue;
        expect_cpu_kernel(batch, objective,
                          std::string(kKlFormNames[form]) + " " +
                              std::string(kKlCorrectionNames[correction]) + " " +
                              std::string(rule_of(level).name));
      }
    }
  }
  for (const KlReference reference : {KlReference::old, KlReference::rollout}) {
    PolicyObjective objective = presets::grpo(0.3);
    objective.kl.reference = reference;
    expect_cpu_kernel(batch, objective, "another reference");
  }
}

TEST(PolicyProgram, EveryAggregationIsThatOfTheCpuKernel) {
  Batch<float> batch = mixed_batch();
  for (size_t mode = 0; mode < kAggregationNames.size(); ++mode) {
    PolicyObjective objective = presets::grpo(0.1);
    objective.aggregation = {static_cast<Aggregation::Mode>(mode), 900};
    expect_cpu_kernel(batch, objective, std::string(kAggregationNames[mode]));
  }
}

TEST(PolicyProgram, CountsOfTheStepAndItsFactorAreThoseOfTheNormalizer) {
  Batch<float> batch = mixed_batch();
  PolicyObjective objective = presets::grpo(0.1);
  const Normalizer normalizer{.policy = 9000, .kl = 7000, .sequences = 11, .world_size = 4};
  for (const Aggregation& aggregation : {token_mean(), sequence_mean_token_mean()}) {
    objective.aggregation = aggregation;
    const PolicyTotals want = batch.run(objective, normalizer);
    const double counts[] = {9000, 7000, 11};
    std::vector<float> gradients(batch.dlogps.size());
    const PolicyTotals got =
        run_program(batch.arrays(), objective,
                    {.logps = {gradients.data(), DType::float32, batch.columns, 1}}, counts, 4);
    expect_same(got, want, gradients, batch.dlogps, "counts");
  }
}

TEST(PolicyProgram, ASlopeBeyondAFloatMeetsItsMaskFirst) {
  Batch<float> batch = mixed_batch();
  for (float& each : batch.mask) each *= 1e-9f;
  for (float& each : batch.advantages) each *= 100;
  PolicyObjective objective = presets::grpo(0.1);
  objective.aggregation = token_mean();
  objective.level = RatioLevel::sequence_mean;
  const double counts[] = {1, 1, 1}, factor = 1e38;
  batch.run(objective, {.policy = 1, .kl = 1, .world_size = factor});
  std::vector<float> gradients(batch.dlogps.size());
  run_program(batch.arrays(), objective,
              {.logps = {gradients.data(), DType::float32, batch.columns, 1}}, counts, factor);
  for (size_t i = 0; i < gradients.size(); ++i) {
    ASSERT_NEAR(gradients[i], batch.dlogps[i], 3e-6 * std::abs(batch.dlogps[i])) << i;
  }
  EXPECT_GT(*std::max_element(gradients.begin(), gradients.end()), 3.4e29f);  // beyond / 1e9
}

TEST(PolicyProgram, EntropiesAndGivenLengthsAreThoseOfTheCpuKernel) {
  Batch<float> batch = mixed_batch();
  std::vector<float> entropies(batch.mask.size()), weights(batch.mask.size()), lengths(6, 650);
  for (size_t i = 0; i < entropies.size(); ++i) {
    entropies[i] = 0.5f + 0.001f * static_cast<float>(i % 700);
    weights[i] = i % 3 == 0 ? 0.0f : 2.0f;
  }
  PolicyObjective objective = presets::grpo(0.1);
  objective.entropy.coefficient = 0.02;
  PolicyArrays arrays = batch.arrays();
  arrays.entropies = batch.view(entropies);
  arrays.entropy_weights = batch.view(weights);
  arrays.row_tokens = {
      .data = lengths.data(), .dtype = DType::float32, .row_stride = 1, .per_row = true};
  std::vector<float> of_logps(batch.mask.size()), of_entropies(batch.mask.size()),
      want_of_entropies(batch.mask.size());
  const auto into = [&](std::vector<float>& memory) {
    return MutableArray{memory.data(), DType::float32, batch.columns, 1};
  };
  const PolicyTotals want =
      policy_loss(arrays, objective, {}, {into(batch.dlogps), into(want_of_entropies)});
  const PolicyTotals got = run_program(arrays, objective, {into(of_logps), into(of_entropies)});
  expect_same(got, want, of_logps, batch.dlogps, "entropies");
  EXPECT_EQ(of_entropies, want_of_entropies);
}

TEST(PolicyProgram, RowsMayBeLongAndMoreThanTheThreadsThatAddThemUp) {
  Batch<float> of_pieces = random_batch<float>(3, 2 * cuda::kPieceTokens + 100);
  for (const char* name : {"ppo", "grpo", "gspo_token", "decoupled_ppo"}) {
    expect_cpu_kernel(of_pieces, preset("test", name), name);
  }
  expect_cpu_kernel(of_pieces, weighed(presets::grpo(), RatioGate{}), "grpo, gated");
  Batch<float> one = random_batch<float>(1, 70001);
  for (const char* name : {"ppo", "gspo_token"}) expect_cpu_kernel(one, preset("test", name), name);
  Batch<float> batch = random_batch<float>(600, 5);
  for (const char* name : {"ppo", "gspo", "decoupled_ppo"}) {
    expect_cpu_kernel(batch, preset("test", name), name);
  }
}

TEST(PolicyProgram, ThreadsOfATeamDoNotRace) {
  Batch<float> batch = random_batch<float>(3, 150);
  PolicyObjective objective = presets::grpo(0.04);
  objective.weights = {TokenWeight(RatioGate{}, WeightLevel::sequence_mean),
                       TokenWeight(TruncatedImportance{}, WeightLevel::sequence_max)};
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean}) {
    objective.level = level;
    expect_no_race(batch, objective);
  }
}

// bfloat16 numbers, a mask of bools, advantages of rows, strides, packed rows.
TEST(PolicyProgram, ReadsArraysOfAnyTypeAndLayout) {
  Batch<float> batch = mixed_batch();
  std::vector<uint16_t> logps, dlogps(batch.mask.size()), wanted(batch.mask.size());
  std::vector<uint8_t> mask;
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    logps.push_back(to_bfloat16(batch.logps[i]));
    mask.push_back(batch.mask[i] != 0);
  }
  std::vector<float> advantages{1, -1, 2, 0.5f, -2, 1};
  const std::vector<int64_t> offsets{0, 0, 3, 300, 1200, 4200};
  PolicyArrays arrays = batch.arrays();
  arrays.logps = {logps.data(), DType::bfloat16, 700, 1};
  arrays.response_mask = {mask.data(), DType::boolean, 700, 1};
  arrays.advantages = {
      .data = advantages.data(), .dtype = DType::float32, .row_stride = 1, .per_row = true};
  for (const bool packed : {false, true}) {
    // The CPU kernel does not look at the columns of packed rows.
    if (packed) arrays.layout = {.rows = 5, .columns = 4200, .offsets64 = offsets.data()};
    for (const PolicyObjective& objective : {presets::grpo(0.04), presets::gspo()}) {
      const PolicyTotals want =
          policy_loss(arrays, objective, {}, {.logps = {wanted.data(), DType::bfloat16, 700, 1}});
      const PolicyTotals got =
          run_program(arrays, objective, {.logps = {dlogps.data(), DType::bfloat16, 700, 1}});
      expect_same(got, want, {}, {}, packed ? "packed" : "bfloat16");
      for (size_t i = 0; i < dlogps.size(); ++i) {
        EXPECT_NEAR(from_bfloat16(dlogps[i]), from_bfloat16(wanted[i]), 1e-8) << i;
      }
    }
  }
}

TEST(PolicyProgram, NonfiniteTokensAreCountedAndComeOut) {
  for (const char* name : {"ppo", "gspo", "gspo_token", "grpo"}) {
    Batch<float> batch = mixed_batch();
    for (size_t i : {1405, 2103, 2804}) batch.mask[i] = 1;
    batch.logps[1405] = NAN;
    batch.advantages[2103] = INFINITY;
    batch.ref_logps[2804] = -INFINITY;
    const PolicyObjective objective = preset("test", name);
    std::vector<float> gradients(batch.mask.size());
    const PolicyTotals want = batch.run(objective);
    const PolicyTotals got = run_program(batch.arrays(), objective,
                                         {.logps = {gradients.data(), DType::float32, 700, 1}});
    EXPECT_TRUE(std::isnan(got.loss)) << name;
    EXPECT_EQ(got.metrics.to_map().at("nonfinite"), want.metrics.to_map().at("nonfinite")) << name;
    for (size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_EQ(std::isnan(gradients[i]), std::isnan(batch.dlogps[i])) << name << " at " << i;
    }
  }
}

// What the CPU kernel refuses.
TEST(PolicyProgram, AWeightOutsideOfItsRangeIsNaN) {
  for (float weight : {-0.5f, 1.5f, NAN}) {
    Batch<float> batch = mixed_batch();
    batch.mask[1500] = weight;
    EXPECT_TRUE(std::isnan(run_program(batch.arrays(), presets::ppo(), {}).loss)) << weight;
  }
}

// The CPU kernel refuses them.
TEST(PolicyProgram, CountsThatAreNoneMakeNaNOfTokensAlone) {
  for (const double count : {0.0, -1.0, double{NAN}}) {
    for (const Aggregation& aggregation :
         {token_mean(), token_sum(), sequence_mean_token_mean(), sequence_mean_token_sum()}) {
      for (const double beta : {0.0, 0.1}) {
        const bool divides = aggregation.mode != Aggregation::Mode::token_sum;
        PolicyObjective objective = presets::grpo(beta);
        objective.aggregation = aggregation;
        Batch<float> batch = mixed_batch();
        std::vector<float> gradients(batch.mask.size());
        const PolicyGradients into{.logps = {gradients.data(), DType::float32, 700, 1}};
        const double none[] = {count, count, count}, of_kl[] = {9000, count, 11};
        EXPECT_EQ(std::isnan(run_program(batch.arrays(), objective, into, none).loss), divides);
        for (size_t i = 0; i < gradients.size(); ++i) {
          EXPECT_TRUE(batch.mask[i] != 0 || gradients[i] == 0) << i;
        }
        const bool by_tokens = aggregation.mode == Aggregation::Mode::token_mean;
        EXPECT_EQ(std::isnan(run_program(batch.arrays(), objective, into, of_kl).loss),
                  beta != 0 && by_tokens);
        std::fill(batch.mask.begin(), batch.mask.end(), 0.0f);
        EXPECT_EQ(run_program(batch.arrays(), objective, into, none).loss, 0);
      }
    }
  }
}

TEST(PolicyProgram, FiniteInputsOfAnySizeGiveFiniteNumbers) {
  for (const CatalogueRow& row : kCatalogue) {
    Batch<float> batch = mixed_batch();
    for (size_t i = 2100; i < 2120; ++i) {
      batch.logps[i] = i % 2 ? -3e38f : 0.0f;
      batch.old_logps[i] = i % 3 ? -3e38f : -1.0f;
      batch.advantages[i] = i % 5 ? 3e38f : -3e38f;
    }
    std::vector<float> gradients(batch.mask.size());
    const PolicyTotals got = run_program(batch.arrays(), row.preset(),
                                         {.logps = {gradients.data(), DType::float32, 700, 1}});
    EXPECT_EQ(got.metrics.to_map().at("nonfinite"), 0) << row.name;
    EXPECT_TRUE(std::isfinite(got.loss)) << row.name;
    for (float gradient : gradients) ASSERT_TRUE(std::isfinite(gradient)) << row.name;
  }
}

}  // namespace
}  // namespace tether
