#include "rl/kernels/value_program.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "rl/catalogue.h"
#include "tests/host_team.h"
#include "tests/rl/value_batch.h"
#include "tests/rl/value_host_launch.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, in the order in which value_loss.cu
// launches them, beside the CPU kernel.

namespace tether {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using OneThread = HostRun<cuda::kValueThreads>;
using RealThreads = ThreadRun<cuda::kValueThreads>;

template <class Run = OneThread>
ValueTotals run_program(const ValueArrays& batch, const ValueObjective& objective,
                        const MutableArray& dvalues, const double* counts = nullptr,
                        double factor = 1, const Run& run = {}) {
  std::vector<double> memory(static_cast<size_t>(cuda::ValueWorkspace::bytes(batch.layout)) / 8);
  ValueTotals out;
  cuda::run_value_loss(batch, objective.loss, objective.aggregation, counts, factor, dvalues, &out,
                       cuda::ValueWorkspace(memory.data()), ValueHostLaunch<Run>{run});
  return out;
}

MutableArray to(std::vector<float>& memory, int64_t columns) {
  return {memory.data(), DType::float32, columns, 1};
}

void expect_near(const ValueTotals& got, const ValueTotals& want) {
  EXPECT_NEAR(got.loss, want.loss, 1e-6 * (1e-3 + std::abs(want.loss)));
  for (size_t i = 0; i < want.metrics.sums.size(); ++i) {
    EXPECT_NEAR(got.metrics.sums[i], want.metrics.sums[i], 1e-5 * (1 + std::abs(want.loss))) << i;
  }
}

const Aggregation kAggregations[] = {token_mean(), token_sum(), sequence_mean_token_mean(),
                                     sequence_mean_token_sum(), sequence_sum_over_constant(7)};

template <class Check>
void for_each_objective(Check check) {
  for (const Aggregation& aggregation : kAggregations) {
    check(ValueObjective{.aggregation = aggregation});
    check(ValueObjective{Huber{.delta = 0.7}, aggregation});
  }
}

TEST(ValueProgram, IsTheCpuKernel) {
  for_each_objective([](const ValueObjective& objective) {
    for (const auto& [rows, columns] : {std::pair{7, 300}, {2, 5000}, {3, 0}, {300, 2}}) {
      ValueRows<float> batch(rows, columns);
      if (columns > 0) std::fill_n(batch.mask.begin(), columns, 0.0f);
      for (size_t i = 0; i < batch.mask.size(); i += 5) batch.mask[i] *= 0.5f;
      for (size_t i = 0; i < batch.mask.size(); i += 11) batch.values[i] = batch.returns[i];
      const ValueTotals want = batch.run(objective);
      std::vector<float> dvalues(batch.values.size(), 7);
      const OneThread backwards{{.backwards = true}};
      expect_near(
          run_program(batch.arrays(), objective, to(dvalues, columns), nullptr, 1, backwards),
          want);
      for (size_t i = 0; i < dvalues.size(); ++i) {
        ASSERT_NEAR(dvalues[i], batch.dvalues[i], 1e-6 * std::abs(batch.dvalues[i])) << i;
      }
    }
  });
}

TEST(ValueProgram, CountsOfTheStepAndAFactor) {
  for_each_objective([](const ValueObjective& objective) {
    ValueRows<float> batch(4, 100);
    const double counts[] = {1000, 9};
    const Normalizer normalizer{.policy = 1000, .sequences = 9, .world_size = 3};
    const ValueTotals want = batch.run(objective, normalizer);
    std::vector<float> dvalues(400);
    expect_near(run_program(batch.arrays(), objective, to(dvalues, 100), counts, 3), want);
    for (size_t i = 0; i < dvalues.size(); ++i) {
      ASSERT_NEAR(dvalues[i], batch.dvalues[i], 1e-6 * std::abs(batch.dvalues[i])) << i;
    }
  });
}

TEST(ValueProgram, PackedRowsWithoutOldValues) {
  for_each_objective([](const ValueObjective& objective) {
    ValueRows<float> batch(1, 1000);
    const std::vector<int32_t> offsets{100, 100, 700, 1000};
    ValueArrays packed = batch.arrays();
    packed.layout = {.rows = 3, .offsets32 = offsets.data()};
    packed.old_values = {};
    std::vector<float> want(1000, 7), got = want;
    const ValueTotals expected = value_loss(packed, objective, {}, to(want, 0));
    expect_near(run_program(packed, objective, to(got, 0)), expected);
    for (size_t i = 0; i < 1000; ++i) ASSERT_NEAR(got[i], want[i], 1e-6 * std::abs(want[i])) << i;
  });
}

// The first token that a thread sees, and its second.
constexpr size_t kFirst = 3, kSecond = kFirst + cuda::kValueThreads;

TEST(ValueProgram, BrokenTokensSpoilTheLossAndTheirOwnGradient) {
  for_each_objective([](const ValueObjective& objective) {
    for (auto member : {&ValueRows<float>::values, &ValueRows<float>::old_values,
                        &ValueRows<float>::returns, &ValueRows<float>::mask}) {
      for (const auto& [place, broken] : std::vector<std::pair<size_t, float>>{
               {kFirst, kNan}, {kFirst, HUGE_VALF}, {kSecond, HUGE_VALF}}) {
        ValueRows<float> batch(2, 300);
        for (const size_t each : {kFirst, kSecond}) {
          batch.mask[each] = 1;
          batch.values[each] = batch.old_values[each] = batch.returns[each] = 0;
        }
        (batch.*member)[place] = broken;
        const double counts[] = {480, 2};
        std::vector<float> dvalues(600);
        const bool by_length =
            objective.aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
        const ValueTotals out = run_program(batch.arrays(), objective, to(dvalues, 300), counts);
        EXPECT_TRUE(std::isnan(out.loss) && std::isnan(dvalues[place]));
        if (member != &ValueRows<float>::mask) {  // which the CPU kernel refuses
          const ValueTotals want = batch.run(objective);
          for (size_t i = 0; i < out.metrics.sums.size(); ++i) {
            EXPECT_EQ(std::isnan(out.metrics.sums[i]), std::isnan(want.metrics.sums[i])) << i;
          }
        }
        const bool spoils_its_row = by_length && member == &ValueRows<float>::mask;
        for (size_t i = spoils_its_row ? 300 : 0; i < 600; ++i) {
          EXPECT_EQ(std::isnan(dvalues[i]), i == place) << i;
        }
      }
    }
  });
}

TEST(ValueProgram, FiniteInputsGiveFiniteNumbers) {
  for_each_objective([](const ValueObjective& objective) {
    ValueRows<float> batch(2, 60);
    for (auto member :
         {&ValueRows<float>::values, &ValueRows<float>::old_values, &ValueRows<float>::returns}) {
      for (float& each : batch.*member) each = std::copysign(3e38f, each);
    }
    std::vector<float> dvalues(120);
    const ValueTotals out = run_program(batch.arrays(), objective, to(dvalues, 60));
    EXPECT_TRUE(std::isfinite(out.loss));
    for (float each : dvalues) EXPECT_TRUE(std::isfinite(each));
  });
}

TEST(ValueProgram, RealThreadsHaveTheSameBits) {
  ValueRows<float> batch(2, 600);
  std::vector<float> want(1200), got = want;
  const ValueObjective objective{.aggregation = sequence_mean_token_mean()};
  const ValueTotals expected = run_program(batch.arrays(), objective, to(want, 600));
  const ValueTotals out =
      run_program(batch.arrays(), objective, to(got, 600), nullptr, 1, RealThreads{});
  EXPECT_EQ(out.loss, expected.loss);
  EXPECT_EQ(out.metrics.sums, expected.metrics.sums);
  EXPECT_EQ(got, want);
}

// The CPU kernel refuses them.
TEST(ValueProgram, CountsThatAreNoneMakeNaNOfTokensAlone) {
  for_each_objective([](const ValueObjective& objective) {
    const bool divides = objective.aggregation.mode != Aggregation::Mode::token_sum;
    for (const double count : {0.0, -1.0, double{kNan}}) {
      const double counts[] = {count, count};
      for (const bool empty : {false, true}) {
        ValueRows<float> batch(2, 5);
        std::fill_n(batch.mask.begin(), empty ? 10 : 1, 0.0f);
        std::fill(batch.mask.begin() + 1, batch.mask.end(), empty ? 0.0f : 1.0f);
        std::vector<float> dvalues(batch.values.size(), 7);
        const ValueTotals out = run_program(batch.arrays(), objective, to(dvalues, 5), counts);
        EXPECT_EQ(std::isnan(out.loss), divides && !empty);
        EXPECT_EQ(dvalues[0], 0);
        EXPECT_EQ(std::isnan(dvalues[1]), divides && !empty);
      }
    }
  });
}

}  // namespace
}  // namespace tether
