#include "rl/kernels/preference_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "rl/catalogue.h"
#include "tests/host_team.h"
#include "tests/rl/preference_batch.h"
#include "tests/rl/preference_host_launch.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, in the order in which
// preference_loss.cu launches them, beside the CPU kernel.

namespace tether {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using OneThread = HostRun<cuda::kPreferenceThreads>;
using RealThreads = ThreadRun<cuda::kPreferenceThreads>;

struct ProgramResult {
  PreferenceTotals totals;
  std::vector<float> dlogps;
};

template <class Run = OneThread>
ProgramResult run_program(const PairRows<float>& rows, const PreferenceArrays& batch,
                          const PreferenceObjective& objective, const double* counts = nullptr,
                          double factor = 1, const Run& run = {}) {
  const int64_t bytes = cuda::PreferenceWorkspace::bytes(batch.layout);
  std::vector<double> memory(static_cast<size_t>(bytes) / 8, kNan);
  ProgramResult out{{}, std::vector<float>(rows.logps.size(), 7)};
  cuda::run_preference_loss(batch, objective, counts, factor,
                            {out.dlogps.data(), DType::float32, rows.columns, 1}, &out.totals,
                            cuda::PreferenceWorkspace(memory.data(), batch.layout),
                            PreferenceHostLaunch<Run>{run});
  return out;
}

void expect_near(const ProgramResult& got, const PreferenceTotals& want,
                 const std::vector<float>& dlogps) {
  EXPECT_NEAR(got.totals.loss, want.loss, 1e-6 * (1 + std::abs(want.loss)));
  for (size_t i = 0; i < want.metrics.sums.size(); ++i) {
    const double sum = want.metrics.sums[i];
    EXPECT_NEAR(got.totals.metrics.sums[i], sum, 1e-6 * (1 + std::abs(sum))) << i;
  }
  double largest = 0;
  for (float each : dlogps) largest = std::max(largest, std::abs(double{each}));
  for (size_t i = 0; i < dlogps.size(); ++i) {
    ASSERT_NEAR(got.dlogps[i], dlogps[i], 1e-6 * std::abs(dlogps[i]) + 1e-7 * largest) << i;
  }
}

// Answers of several lengths, one of them and one pair without tokens.
PairRows<float> batch_for(const PreferenceObjective& objective, int64_t columns = 40) {
  PairRows<float> rows(6, columns);
  const auto empty = [&](int64_t row) {
    std::fill_n(rows.mask.begin() + row * columns, columns, 0.0f);
  };
  empty(1), empty(7), empty(2);
  for (int64_t row = 0; row < rows.rows; ++row) {  // shorter answers
    std::fill_n(rows.mask.begin() + (row + 1) * columns - 3 * row, 3 * row, 0.0f);
  }
  for (size_t i = 0; i < rows.mask.size(); i += 7) rows.mask[i] *= 0.5f;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const auto number = static_cast<float>(row);
    if (objective.loss.takes_labels()) rows.labels.push_back(row % 3 == 0 ? 1.0f : 0.25f);
    rows.baselines.push_back(0.1f * number - 0.3f);
    rows.answer_weights.push_back(0.5f + 0.1f * number);
  }
  return rows;
}

template <class Check>
void for_each_objective(Check check) {
  for (const auto& row : kPreferenceCatalogue) {
    SCOPED_TRACE(row.name);
    check(row.preset());
  }
}

TEST(PreferenceProgram, IsTheCpuKernelForEveryObjective) {
  for_each_objective([](const PreferenceObjective& objective) {
    PairRows<float> rows = batch_for(objective);
    const PreferenceTotals want = rows.run(objective);
    const OneThread backwards{{.backwards = true}};
    expect_near(run_program(rows, rows.arrays(), objective, nullptr, 1, backwards), want,
                rows.dlogps);
  });
}

TEST(PreferenceProgram, IsTheCpuKernelForEveryLinkMeanAndTail) {
  for_each_link([](const auto& row) {
    for (const NllMean mean : {NllMean::token, NllMean::sequence_mean, NllMean::sequence_sum}) {
      for (const PairScore score : {PairScore::sum, PairScore::mean}) {
        for (const double ld_alpha : {1.0, 0.3, 0.0}) {
          for (const bool own_mask : {false, true}) {
            const Link link = row.defaults;
            const bool reference = link.traits().of_log_ratio;
            const PreferenceObjective objective{.score = score,
                                                .reference = reference,
                                                .ld_alpha = ld_alpha,
                                                .link = link,
                                                .loss = LogisticPair{},
                                                .loss_weight = 0.7,
                                                .nll = {0.4, mean}};
            PairRows<float> rows = batch_for(objective, 300);
            if (own_mask) {
              for (size_t i = 0; i < rows.mask.size(); ++i) {
                rows.nll_mask.push_back(i % 3 == 0 && rows.mask[i] != 0 ? 1.0f : 0.0f);
              }
            }
            const PreferenceTotals want = rows.run(objective);
            expect_near(run_program(rows, rows.arrays(), objective), want, rows.dlogps);
          }
        }
      }
    }
  });
}

TEST(PreferenceProgram, CountsOfTheStepAndAFactor) {
  for_each_objective([](PreferenceObjective objective) {
    objective.nll = {0.4};
    PairRows<float> rows = batch_for(objective);
    const double counts[] = {100, 7000};
    const PreferenceTotals want =
        rows.run(objective, {.pairs = 100, .tokens = 7000, .world_size = 3});
    expect_near(run_program(rows, rows.arrays(), objective, counts, 3), want, rows.dlogps);
  });
}

TEST(PreferenceProgram, SlopesBeyondAFloatMeetTheirMasksFirst) {
  for_each_objective([](PreferenceObjective objective) {
    objective.nll = {0.4};
    PairRows<float> rows = batch_for(objective);
    for (float& each : rows.mask) each *= 1e-9f;
    const double counts[] = {1, 1};
    const PreferenceTotals want =
        rows.run(objective, {.pairs = 1, .tokens = 1, .world_size = 1e42});
    expect_near(run_program(rows, rows.arrays(), objective, counts, 1e42), want, rows.dlogps);
    const auto [least, most] = std::minmax_element(rows.dlogps.begin(), rows.dlogps.end());
    EXPECT_GT(*most - *least, 3.4e29f);
  });
}

TEST(PreferenceProgram, CountsAreThoseOfTheCpuKernel) {
  for_each_objective([](const PreferenceObjective& objective) {
    PairRows<float> rows = batch_for(objective);
    rows.nll_mask = rows.mask;
    rows.nll_mask[0] = 0;
    const PairNormalizer want = local_counts(rows.arrays());
    double counts[2];
    std::vector<double> memory(
        static_cast<size_t>(cuda::PreferenceWorkspace::bytes(rows.arrays().layout)) / 8);
    cuda::run_preference_counts(rows.arrays(),
                                cuda::PreferenceWorkspace(memory.data(), rows.arrays().layout),
                                counts, PreferenceHostLaunch<OneThread>{});
    EXPECT_EQ(counts[0], *want.pairs);
    EXPECT_EQ(counts[1], *want.tokens);
  });
}

TEST(PreferenceProgram, PackedAndLongRows) {
  const PreferenceObjective objective{.ld_alpha = 0.5, .loss = LogisticPair{}, .nll = {0.4}};
  PairRows<float> rows(1, 5000);
  std::fill(rows.mask.begin() + 7000, rows.mask.end(), 0.0f);
  const PreferenceTotals want = rows.run(objective);
  expect_near(run_program(rows, rows.arrays(), objective), want, rows.dlogps);
  const std::vector<int64_t> offsets{500, 500, 4000, 6500, 9000};
  PreferenceArrays packed = rows.arrays();
  packed.layout = {.rows = 4, .offsets64 = offsets.data()};
  std::vector<float> dlogps(rows.logps.size(), 7);
  const PreferenceTotals of_packed =
      preference_loss(packed, objective, {}, {dlogps.data(), DType::float32, 0, 1});
  expect_near(run_program(rows, packed, objective), of_packed, dlogps);
}

// The CPU kernel refuses some of them.
TEST(PreferenceProgram, BrokenNumbersSpoilTheirExample) {
  for_each_objective([](const PreferenceObjective& objective) {
    for (auto member : {&PairRows<float>::logps, &PairRows<float>::ref_logps,
                        &PairRows<float>::mask, &PairRows<float>::baselines,
                        &PairRows<float>::answer_weights, &PairRows<float>::labels}) {
      const bool signed_number = member == &PairRows<float>::logps ||
                                 member == &PairRows<float>::ref_logps ||
                                 member == &PairRows<float>::baselines;
      for (const float broken : {kNan, HUGE_VALF, -1.0f}) {
        PairRows<float> rows = batch_for(objective);
        if ((rows.*member).empty() || (broken == -1 && signed_number)) continue;
        if (member == &PairRows<float>::ref_logps && !objective.reference) continue;
        rows.mask[1] = 1;
        rows.logps[1] = rows.ref_logps[1] = -1;
        const size_t at = (rows.*member).size() == rows.logps.size() ? 1 : 0;
        (rows.*member)[at] = broken;
        const double counts[] = {6, 100};
        const ProgramResult out = run_program(rows, rows.arrays(), objective, counts);
        EXPECT_TRUE(std::isnan(out.totals.loss));
        EXPECT_TRUE(std::isnan(out.dlogps[1]));
        EXPECT_EQ(out.totals.metrics.sums[2 * PreferenceMetrics::kNonfinite], 1);
        EXPECT_FALSE(std::isnan(out.dlogps[3 * 40 + 1]));
      }
    }
  });
}

// The CPU kernel refuses them.
TEST(PreferenceProgram, CountsThatAreNoneMakeNaNOfTokensAlone) {
  for_each_objective([](PreferenceObjective objective) {
    for (const double count : {0.0, -1.0, double{kNan}}) {
      for (const double coefficient : {0.0, 0.4}) {
        for (const bool of_pairs : {true, false}) {
          objective.nll = {coefficient};
          PairRows<float> rows = batch_for(objective);
          const double counts[] = {of_pairs ? count : 6, of_pairs ? 100 : count};
          const bool divides = of_pairs || coefficient != 0;
          const ProgramResult out = run_program(rows, rows.arrays(), objective, counts);
          EXPECT_EQ(std::isnan(out.totals.loss), divides);
          EXPECT_EQ(out.dlogps[40], 0);  // of a row without tokens
          std::fill(rows.mask.begin(), rows.mask.end(), 0.0f);
          EXPECT_EQ(run_program(rows, rows.arrays(), objective, counts).totals.loss, 0);
        }
      }
    }
  });
}

TEST(PreferenceProgram, LikelyAnswersAreNaNUnderALinkOfProbabilities) {
  const PreferenceObjective objective{
      .reference = false, .link = LogOdds{}, .loss = LogisticPair{}};
  PairRows<float> rows = batch_for(objective);
  for (size_t i = 0; i < 40; ++i) {
    if (rows.mask[i] != 0) rows.logps[i] = 1;
  }
  const ProgramResult out = run_program(rows, rows.arrays(), objective);
  EXPECT_TRUE(std::isnan(out.totals.loss));
  EXPECT_EQ(out.totals.metrics.sums[2 * PreferenceMetrics::kNonfinite], 1);
}

TEST(PreferenceProgram, FiniteInputsGiveNoNaN) {
  for_each_objective([](const PreferenceObjective& objective) {
    if (!objective.link.traits().of_log_ratio) return;
    PairRows<float> rows = batch_for(objective);
    for (float& each : rows.logps) each *= 1e37f;
    const ProgramResult out = run_program(rows, rows.arrays(), objective);
    EXPECT_FALSE(std::isnan(out.totals.loss));
    for (float each : out.dlogps) EXPECT_FALSE(std::isnan(each));
  });
}

TEST(PreferenceProgram, RealThreadsHaveTheSameBits) {
  const PreferenceObjective objective{.ld_alpha = 0.5, .loss = LogisticPair{}, .nll = {0.4}};
  PairRows<float> rows(1, 300);
  std::fill_n(rows.mask.begin() + 200, 100, 0.0f);
  const ProgramResult want = run_program(rows, rows.arrays(), objective);
  const ProgramResult got = run_program(rows, rows.arrays(), objective, nullptr, 1, RealThreads{});
  EXPECT_EQ(got.totals.loss, want.totals.loss);
  EXPECT_EQ(got.totals.metrics.sums, want.totals.metrics.sums);
  EXPECT_EQ(got.dlogps, want.dlogps);
}

}  // namespace
}  // namespace tether
