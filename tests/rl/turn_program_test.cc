#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "rl/catalogue.h"
#include "rl/policy/gmpo.h"
#include "tests/rl/policy_program.h"

// Levels and weights of turns by the programs of the CUDA kernels, beside the CPU kernel.

namespace tether {
namespace {

constexpr RatioLevel kTurnLevels[] = {RatioLevel::turn_mean, RatioLevel::turn_token,
                                      RatioLevel::turn_sum};

// Turns of 1 to 2 * mean slots, numbered with gaps.
std::vector<int64_t> random_ids(const Batch<float>& batch, int mean) {
  std::mt19937 random(3);
  std::vector<int64_t> out(batch.mask.size());
  int64_t id = 0;
  int left = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    if (i % static_cast<size_t>(batch.columns) == 0) id = left = 0;
    if (left-- == 0) {
      id += 1 + static_cast<int64_t>(random() % 3);
      left = static_cast<int>(random() % static_cast<unsigned>(2 * mean));
    }
    out[i] = id;
  }
  return out;
}

// With ids of turns of 1 to 40 slots, and any number at masked ones.
Batch<float> batch_of_turns() {
  Batch<float> batch = mixed_batch();
  spoil_masked(batch);
  batch.turn_ids = random_ids(batch, 20);
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    if (batch.mask[i] != 0) continue;
    batch.turn_ids[i] = i % 2 ? std::numeric_limits<int64_t>::min() : 1 << 20;
  }
  return batch;
}

// By ids, and by runs of the mask.
template <class Check>
void with_both_marks(const Check& check) {
  Batch<float> batch = batch_of_turns();
  check(batch, ", by ids");
  batch.turn_ids.clear();
  check(batch, ", by runs");
}

std::string text_of(RatioLevel level) { return std::string(" ").append(rule_of(level).name); }

TEST(TurnProgram, EveryRowOfTheCatalogueIsThatOfTheCpuKernel) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    for (const CatalogueRow& row : kCatalogue) {
      for (const RatioLevel level : kTurnLevels) {
        PolicyObjective objective = row.preset();
        objective.level = level;
        expect_cpu_kernel(batch, objective, std::string(row.name) + text_of(level) + marks);
      }
    }
  });
}

TEST(TurnProgram, EveryWeightIsThatOfTheCpuKernelAtEveryLevel) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    for_each_weight([&](const auto& row) {
      for (const WeightLevel level : {WeightLevel::turn_mean, WeightLevel::turn_sum,
                                      WeightLevel::turn_min, WeightLevel::turn_max}) {
        PolicyObjective objective = presets::grpo(0.04);
        objective.weights = {TokenWeight(row.defaults, level)};
        expect_cpu_kernel(batch, objective,
                          std::string(row.name).append(" ").append(rule_of(level).name) + marks);
      }
    });
  });
}

// Gates of turns and tokens, weights at all levels, the caller's, under a ratio of turns.
TEST(TurnProgram, ManyWeightsUnderALevelOfTurnsAreThoseOfTheCpuKernel) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    batch.token_weights.assign(batch.mask.size(), 0.75f);
    PolicyObjective objective = presets::gspo();
    objective.weights = {TokenWeight(RatioGate{.high = 1.02}, WeightLevel::turn_max),
                         TokenWeight(TvGate{}, WeightLevel::token),
                         TokenWeight(TruncatedImportance{.high = 1.01}, WeightLevel::turn_sum),
                         TokenWeight(TruncatedImportance{}, WeightLevel::sequence_mean),
                         TokenWeight(MaskedRatio{}, WeightLevel::turn_mean)};
    for (const RatioLevel level : kTurnLevels) {
      objective.level = level;
      expect_cpu_kernel(batch, objective, text_of(level) + marks);
    }
  });
}

TEST(TurnProgram, EveryCorrectionOfAPenaltyIsThatOfTheCpuKernel) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    batch.kl_weights.assign(batch.mask.size(), 1.5f);
    for (const RatioLevel level : kTurnLevels) {
      for (size_t correction = 0; correction < kKlCorrectionNames.size(); ++correction) {
        PolicyObjective objective = presets::grpo(0.3);
        objective.level = level;
        objective.kl.allow_biased_gradient = true;
        objective.kl.ratio_high = 1.1;
        objective.kl.correction = static_cast<KlCorrection>(correction);
        if (objective.kl.correction == KlCorrection::level_ratio && shares_ratio(level)) continue;
        expect_cpu_kernel(batch, objective,
                          std::string(kKlCorrectionNames[correction]) + text_of(level) + marks);
      }
    }
  });
}

TEST(TurnProgram, ClippedLogRatiosAndAggregationsAreThoseOfTheCpuKernel) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    for (const RatioLevel level : kTurnLevels) {
      PolicyObjective objective = presets::gmpo();
      objective.level = level;
      objective.log_ratio_clip = {0.01, 0.02};
      for (size_t mode = 0; mode < kAggregationNames.size(); ++mode) {
        objective.aggregation = {static_cast<Aggregation::Mode>(mode), 900};
        expect_cpu_kernel(batch, objective,
                          std::string(kAggregationNames[mode]) + text_of(level) + marks);
      }
    }
  });
}

// Longer than a tile, than a piece, of one token; a row that is one turn.
TEST(TurnProgram, TurnsMayBeOfAnyLength) {
  for (const int mean : {1, 3, 400, 3000, 1 << 20}) {
    Batch<float> batch = random_batch<float>(3, 2 * cuda::kPieceTokens + 100);
    for (size_t i = 0; i < batch.mask.size(); ++i) {  // sums are to stay within a float
      batch.old_logps[i] = batch.logps[i] + 0.01f * (batch.old_logps[i] - batch.logps[i]);
      if (i % 900 > 500) batch.mask[i] = 0;
    }
    batch.turn_ids = random_ids(batch, mean);
    for (const RatioLevel level : kTurnLevels) {
      PolicyObjective objective = presets::grpo(0.04);
      objective.level = level;
      objective.weights = {TokenWeight(TruncatedImportance{}, WeightLevel::turn_mean)};
      expect_cpu_kernel(batch, objective, std::to_string(mean) + text_of(level));
    }
  }
  Batch<float> many = random_batch<float>(600, 5);
  PolicyObjective objective = presets::grpo();
  objective.level = RatioLevel::turn_mean;
  expect_cpu_kernel(many, objective, "many rows");
}

// The gradients of a batch by the programs, the loss at the end.
std::vector<float> by_program(const PolicyArrays& arrays, const PolicyObjective& objective,
                              int64_t slots, const double* counts = nullptr) {
  std::vector<float> out(static_cast<size_t>(slots));
  const int64_t columns = arrays.layout.columns;
  const PolicyTotals totals =
      run_program(arrays, objective, {.logps = {out.data(), DType::float32, columns, 1}}, counts);
  out.push_back(static_cast<float>(totals.loss));
  return out;
}

PolicyObjective of_turns(RatioLevel level) {
  PolicyObjective objective = presets::grpo(0.1);
  objective.level = level;
  objective.weights = {TokenWeight(RatioGate{.high = 1.1}, WeightLevel::turn_mean),
                       TokenWeight(TruncatedImportance{}, WeightLevel::turn_max)};
  return objective;
}

// What the definition says, without turns: a token alone is its turn, and so is a whole row.
TEST(TurnProgram, TurnsOfATokenAreTokensAndTurnsOfARowAreSequences) {
  Batch<float> batch = mixed_batch();
  for (size_t i = 0; i < batch.mask.size(); ++i) batch.turn_ids.push_back(static_cast<int64_t>(i));
  PolicyObjective objective = presets::grpo(0.1);
  const auto slots = static_cast<int64_t>(batch.mask.size());
  const auto evaluated = [&](RatioLevel level) {
    objective.level = level;
    return by_program(batch.arrays(), objective, slots);
  };
  const auto expect_near = [](const std::vector<float>& got, const std::vector<float>& want) {
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-6f) << i;
  };
  expect_near(evaluated(RatioLevel::turn_mean), evaluated(RatioLevel::token));
  batch.turn_ids.assign(batch.mask.size(), -7);
  expect_near(evaluated(RatioLevel::turn_mean), evaluated(RatioLevel::sequence_mean));
  expect_near(evaluated(RatioLevel::turn_sum), evaluated(RatioLevel::sequence_sum));
  expect_near(evaluated(RatioLevel::turn_token), evaluated(RatioLevel::sequence_token));
}

// Packed rows, ids of 32 bits and of any stride, and smaller ids, which begin a turn too: same
// bits.
TEST(TurnProgram, BitsDoNotDependOnLayoutTypesAndNumbersOfIds) {
  Batch<float> batch = batch_of_turns();
  const auto slots = static_cast<int64_t>(batch.mask.size());
  std::vector<int32_t> narrow_ids, strided;
  std::vector<int64_t> descending, offsets;
  for (const int64_t id : batch.turn_ids) {
    narrow_ids.push_back(static_cast<int32_t>(std::max<int64_t>(id, -5)));
    strided.insert(strided.end(), {narrow_ids.back(), 77, 78});
    descending.push_back(-std::max<int64_t>(id, -5));
  }
  for (int64_t row = 0; row <= batch.rows; ++row) offsets.push_back(row * batch.columns);
  for (const RatioLevel level : kTurnLevels) {
    const PolicyObjective objective = of_turns(level);
    const std::vector<float> want = by_program(batch.arrays(), objective, slots);
    PolicyArrays arrays = batch.arrays();
    for (const ConstArray& ids : {ConstArray{narrow_ids.data(), DType::int32, 700, 1},
                                  ConstArray{strided.data(), DType::int32, 2100, 3},
                                  ConstArray{descending.data(), DType::int64, 700, 1}}) {
      arrays.turn_ids = ids;
      EXPECT_EQ(by_program(arrays, objective, slots), want) << text_of(level);
    }
    arrays = batch.arrays();
    arrays.layout = {.rows = batch.rows, .columns = slots, .offsets64 = offsets.data()};
    EXPECT_EQ(by_program(arrays, objective, slots), want) << text_of(level);
  }
}

// Rows of a batch, by the counts of all, add up to it.
TEST(TurnProgram, RowsAddUpToTheirBatch) {
  Batch<float> batch = batch_of_turns();
  const double counts[] = {3000, 3000, 5};
  for (const RatioLevel level : kTurnLevels) {
    const PolicyObjective objective = of_turns(level);
    const std::vector<float> want = by_program(batch.arrays(), objective, 4200, counts);
    double loss = 0;
    for (int64_t row = 0; row < 6; ++row) {
      PolicyArrays one = batch.arrays();
      one.layout.rows = 1;
      for (const auto& each : PolicyArrays::arguments()) {
        ConstArray& array = one.*each.member;
        if (!array) continue;
        array.data = static_cast<const char*>(array.data) + row * 700 * bytes_of(array.dtype);
      }
      const std::vector<float> got = by_program(one, objective, 700, counts);
      for (size_t i = 0; i < 700; ++i) {
        ASSERT_EQ(got[i], want[static_cast<size_t>(row) * 700 + i]) << text_of(level) << i;
      }
      loss += got[700];
    }
    EXPECT_NEAR(loss, want[4200], 1e-6);
  }
}

// A NaN spoils its turn where the ratio is shared, else its token, and nothing beside it.
TEST(TurnProgram, NonfiniteTokensSpoilTheirTurn) {
  with_both_marks([](Batch<float>& batch, const std::string& marks) {
    if (!batch.turn_ids.empty()) batch.turn_ids = random_ids(batch, 20);
    for (const size_t i : {1405, 2103, 2804}) {
      batch.mask[i] = batch.advantages[i] = 1;
      batch.logps[i] = batch.old_logps[i] = batch.ref_logps[i] = batch.rollout_logps[i] = -1;
    }
    batch.logps[1405] = NAN;
    batch.advantages[2103] = INFINITY;
    batch.ref_logps[2804] = -INFINITY;
    for (const RatioLevel level : kTurnLevels) {
      PolicyObjective objective = presets::grpo(0.1);
      objective.level = level;
      std::vector<float> gradients(batch.mask.size());
      const PolicyTotals want = batch.run(objective);
      const PolicyTotals got = run_program(batch.arrays(), objective,
                                           {.logps = {gradients.data(), DType::float32, 700, 1}});
      EXPECT_TRUE(std::isnan(got.loss));
      EXPECT_EQ(got.metrics.to_map().at("nonfinite"), want.metrics.to_map().at("nonfinite"));
      for (size_t i = 0; i < gradients.size(); ++i) {
        EXPECT_EQ(std::isnan(gradients[i]), std::isnan(batch.dlogps[i]))
            << text_of(level) << marks << " at " << i;
      }
    }
  });
}

TEST(TurnProgram, FiniteInputsOfAnySizeGiveFiniteNumbers) {
  for (const RatioLevel level : kTurnLevels) {
    Batch<float> batch = batch_of_turns();
    batch.turn_ids = random_ids(batch, 20);
    for (size_t i = 2100; i < 2120; ++i) {
      batch.mask[i] = 1;
      batch.logps[i] = i % 2 ? -3e38f : 0.0f;
      batch.old_logps[i] = i % 3 ? -3e38f : -1.0f;
      batch.ref_logps[i] = batch.rollout_logps[i] = -1;
      batch.advantages[i] = i % 5 ? 3e38f : -3e38f;
    }
    std::vector<float> gradients(batch.mask.size());
    const PolicyTotals got = run_program(batch.arrays(), of_turns(level),
                                         {.logps = {gradients.data(), DType::float32, 700, 1}});
    EXPECT_EQ(got.metrics.to_map().at("nonfinite"), 0);
    EXPECT_TRUE(std::isfinite(got.loss));
    for (const float gradient : gradients) ASSERT_TRUE(std::isfinite(gradient));
  }
}

// Without a gradient, and of a batch without tokens.
TEST(TurnProgram, LossesWithoutGradientsAndEmptyBatches) {
  Batch<float> batch = batch_of_turns();
  for (const RatioLevel level : kTurnLevels) {
    const PolicyObjective objective = of_turns(level);
    const auto slots = static_cast<int64_t>(batch.mask.size());
    EXPECT_EQ(static_cast<float>(run_program(batch.arrays(), objective, {}).loss),
              by_program(batch.arrays(), objective, slots).back());
    Batch<float> none(3, 0);
    EXPECT_EQ(run_program(none.arrays(), objective, {}).loss, 0);
    EXPECT_EQ(run_program(Batch<float>(0, 9).arrays(), objective, {}).loss, 0);
  }
}

TEST(TurnProgram, ThreadsOfATeamDoNotRace) {
  Batch<float> batch = random_batch<float>(3, 150);
  for (const int mean : {0, 5}) {
    if (mean > 0) batch.turn_ids = random_ids(batch, mean);
    for (const RatioLevel level : {RatioLevel::turn_mean, RatioLevel::turn_token}) {
      expect_no_race(batch, of_turns(level));
    }
  }
}

}  // namespace
}  // namespace tether
