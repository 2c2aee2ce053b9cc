#include "estimators/advantage/row_scan_program.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/half.h"
#include "tests/estimators/advantage/recursion_rows.h"
#include "tests/host_team.h"
#include "tests/thread_team.h"

// The program of the CUDA kernel on a team of host threads, beside the CPU kernel.

namespace tether {
namespace {

using namespace recursion_test;

// run(formula) with the formula inside.
template <class Run>
void with_formula(const Recursion& recursion, Run run) {
  for_each_recursion([&]<class Formula>(const FormulaRow<Formula>&) {
    if (const Formula* formula = recursion.target<Formula>()) run(*formula);
  });
}

void run_program(const AdvantageArrays& batch, const Recursion& recursion,
                 const MutableArray& advantages, const MutableArray& returns,
                 bool backwards = false) {
  const auto in = cuda::scan_parameters(batch, recursion, advantages, returns);
  const HostTeam<cuda::kScanThreads> team{backwards};
  with_formula(recursion, [&](const auto& formula) {
    for (int64_t row = 0; row < batch.layout.rows; ++row) {
      cuda::row_scan_program(team, formula, in, row);
    }
  });
}

RowResults run_program(const Rows& rows, const Recursion& recursion, const AdvantageArrays& batch,
                       bool backwards = false) {
  RowResults out{Doubles(rows.rewards.size(), 7), Doubles(rows.rewards.size(), 7)};
  run_program(batch, recursion, {out.advantages.data(), DType::float64, rows.columns, 1},
              {out.returns.data(), DType::float64, rows.columns, 1}, backwards);
  return out;
}

void expect_near(const RowResults& got, const RowResults& want, double bound = 1e-13) {
  for (size_t i = 0; i < want.advantages.size(); ++i) {
    const double A = want.advantages[i], R = want.returns[i];
    ASSERT_NEAR(got.advantages[i], A, bound * (1 + std::abs(A))) << i;
    ASSERT_NEAR(got.returns[i], R, bound * (1 + std::abs(R))) << i;
  }
}

// The arrays that may be absent, in all combinations.
template <class Check>
void for_each_batch(const Rows& rows, Check check) {
  for (int absent = 0; absent < 16; ++absent) {
    SCOPED_TRACE(absent);
    AdvantageArrays batch = rows.arrays();
    if (absent & 1) batch.done = {};
    if (absent & 2) batch.truncated = {};
    if (absent & 4) batch.lambdas = {};
    if (absent & 8) batch.bootstrap = {};
    check(batch);
  }
}

TEST(RowScanProgram, IsTheCpuKernel) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    std::fill_n(rows.mask.begin() + 505, 15, 0.0);  // a gap from one tile to the next
    for_each_batch(rows, [&](const AdvantageArrays& batch) {
      expect_near(run_program(rows, recursion, batch), rows.run(recursion, batch));
    });
  });
}

// Without discounts and ends: what the last tile says reaches the first token.
TEST(RowScanProgram, ALongRowIsOneRow) {
  for_each_recursion([](const auto& row) {
    for (const MaskGap gap : {MaskGap::carry, MaskGap::decay}) {
      auto estimator = row.defaults;
      estimator.gap = gap;
      Rows rows(4, 1, 70001);
      AdvantageArrays batch = rows.arrays();
      batch.done = batch.truncated = batch.lambdas = {};
      expect_near(run_program(rows, estimator, batch), rows.run(estimator, batch), 1e-11);
    }
  });
}

TEST(RowScanProgram, PackedRowsHaveTheBitsOfPaddedOnes) {
  for_each_case([](const Recursion& recursion) {
    const Rows rows;
    const RowResults padded = run_program(rows, recursion, rows.arrays());
    Rows dense = rows;
    std::vector<int32_t> offsets{0};
    std::vector<size_t> places;
    for (int64_t row = 0; row < rows.rows; ++row) {
      const int64_t length = row == 2 ? 0 : rows.columns - 70 * row;
      for (int64_t i = 0; i < length; ++i) {
        places.push_back(static_cast<size_t>(row * rows.columns + i));
      }
      offsets.push_back(static_cast<int32_t>(places.size()));
    }
    for (Doubles* each : dense.of_tokens()) {
      for (size_t i = 0; i < places.size(); ++i) (*each)[i] = (*each)[places[i]];
    }
    AdvantageArrays batch = dense.arrays();
    batch.layout = {.rows = rows.rows, .offsets32 = offsets.data()};
    const RowResults packed = run_program(dense, recursion, batch, true);
    for (size_t i = 0; i < places.size(); ++i) {
      ASSERT_EQ(packed.advantages[i], padded.advantages[places[i]]) << i;
      ASSERT_EQ(packed.returns[i], padded.returns[places[i]]) << i;
    }
    EXPECT_EQ(packed.advantages[places.size()], 7);
  });
}

TEST(RowScanProgram, MaskedSlotsAreNotLookedAtAndComeOutAsZero) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    const RowResults clean = run_program(rows, recursion, rows.arrays());
    for (size_t i = 0; i < rows.mask.size(); ++i) {
      if (rows.mask[i] != 0) continue;
      for (Doubles* each : rows.of_tokens()) {
        if (each != &rows.mask) (*each)[i] = kNaN;
      }
      ASSERT_EQ(clean.advantages[i], 0);
      ASSERT_EQ(clean.returns[i], 0);
    }
    EXPECT_EQ(run_program(rows, recursion, rows.arrays(), true), clean);
  });
}

// NaN where the CPU kernel has it, and nowhere else.
void expect_same_nan(const RowResults& got, const RowResults& want) {
  for (size_t i = 0; i < want.advantages.size(); ++i) {
    ASSERT_EQ(std::isnan(got.advantages[i]), std::isnan(want.advantages[i])) << i;
    ASSERT_EQ(std::isnan(got.returns[i]), std::isnan(want.returns[i])) << i;
  }
}

TEST(RowScanProgram, NaNAndInfinityGoAsFarAsOnTheCpu) {
  for_each_case([](Recursion recursion) {
    for (const double broken : {kNaN, HUGE_VAL, -HUGE_VAL}) {
      if (broken < 0) {  // and the discounts are 0
        recursion.for_each_field([](auto, double& option, const Range&) { option = 0; });
      }
      for (size_t place : {0u, 3u, 511u, 512u, 520u}) {
        for (size_t array = 0; array < 8; ++array) {
          if (array == 2 || array == 3 || array == 4 || array == 6) continue;  // no numbers
          Rows rows;
          std::fill_n(rows.mask.begin() + 505, 20, 1.0);
          rows.mask[0] = rows.mask[3] = 1;
          if (array == 5) rows.truncated[place] = 1, rows.done[place] = 0;
          (*rows.of_tokens()[array])[place] = broken;
          rows.bootstrap[1] = broken;
          std::fill_n(rows.mask.begin() + 600, 600, 1.0);
          rows.truncated[1199] = rows.done[1199] = 0;
          expect_same_nan(run_program(rows, recursion, rows.arrays()), rows.run(recursion));
        }
      }
    }
  });
}

// The CPU kernel refuses them.
TEST(RowScanProgram, WhatIsNoWeightAndNoLambdaIsNaN) {
  for_each_case([](const Recursion& recursion) {
    for (Doubles Rows::* member : {&Rows::mask, &Rows::lambdas}) {
      if (member == &Rows::lambdas && !recursion.has_lambda()) continue;
      for (const double illegal : {-0.5, 1.5, kNaN}) {
        Rows rows;
        rows.mask[500] = 1;
        rows.done[500] = 0;
        rows.truncated[500] = 0;
        (rows.*member)[500] = illegal;
        const RowResults out = run_program(rows, recursion, rows.arrays());
        EXPECT_TRUE(std::isnan(out.advantages[500]));
        EXPECT_FALSE(std::isnan(out.advantages[501]));
      }
    }
  });
}

TEST(RowScanProgram, FiniteInputsGiveNoNaN) {
  expect_no_nan(10, [](const Rows& rows, const Recursion& recursion, const AdvantageArrays& batch) {
    return run_program(rows, recursion, batch);
  });
}

// bfloat16 and boolean in, float16 out, at strides; one result alone.
TEST(RowScanProgram, AnyTypesAndStrides) {
  const Rows rows;
  const size_t size = rows.rewards.size();
  std::vector<uint16_t> rewards(2 * size), advantages(2 * size, 99);
  std::vector<float> values(size);
  std::vector<uint8_t> mask(size);
  Rows rounded = rows;
  for (size_t i = 0; i < size; ++i) {
    rewards[2 * i] = to_bfloat16(static_cast<float>(rows.rewards[i]));
    rounded.rewards[i] = from_bfloat16(rewards[2 * i]);
    rounded.values[i] = values[i] = static_cast<float>(rows.values[i]);
    mask[i] = rows.mask[i] != 0 ? 255 : 0;
  }
  AdvantageArrays batch = rounded.arrays();
  batch.rewards = {rewards.data(), DType::bfloat16, 2 * rows.columns, 2};
  batch.values = {values.data(), DType::float32, rows.columns, 1};
  batch.response_mask = {mask.data(), DType::boolean, rows.columns, 1};
  const Recursion recursion = Gae{.gamma = 0.9, .lambda = 0.8};
  run_program(batch, recursion, {advantages.data(), DType::float16, 2 * rows.columns, 2}, {});
  const RowResults want = rounded.run(recursion);
  for (size_t i = 0; i < size; ++i) {
    ASSERT_NEAR(from_float16(advantages[2 * i]), want.advantages[i], 2e-3) << i;
    ASSERT_EQ(advantages[2 * i + 1], 99);
  }
}

// Every row of a call is a team of real threads, that wait where the device's do.
TEST(RowScanProgram, RealThreadsHaveTheSameBits) {
  using Team = ThreadTeam<cuda::kScanThreads>;
  const Rows rows(3, 2, 530);
  const AdvantageArrays batch = rows.arrays();
  const Vtrace vtrace{.gamma = 0.9, .lambda = 0.8, .gap = MaskGap::decay};
  RowResults out{Doubles(rows.rewards.size()), Doubles(rows.rewards.size())};
  const auto in =
      cuda::scan_parameters(batch, vtrace, {out.advantages.data(), DType::float64, rows.columns, 1},
                            {out.returns.data(), DType::float64, rows.columns, 1});
  Team::run(2, [&](const Team& team, int row) { cuda::row_scan_program(team, vtrace, in, row); });
  EXPECT_EQ(out, run_program(rows, vtrace, batch));
}

// A row that ends with its tile.
TEST(RowScanProgram, AnInfiniteBootstrapIsNaN) {
  Rows rows(3, 1, 512);
  std::fill(rows.mask.begin(), rows.mask.end(), 1.0);
  rows.done[511] = rows.truncated[511] = 0;
  rows.bootstrap[0] = HUGE_VAL;
  const RowResults out = run_program(rows, Gae{}, rows.arrays());
  EXPECT_TRUE(std::isnan(out.advantages[511]) && std::isnan(out.returns[511]));
}

TEST(RowScanProgram, EmptyRowsAreNothing) {
  Rows rows(3, 2, 0);
  const RowResults out = run_program(rows, Gae{}, rows.arrays());
  EXPECT_TRUE(out.advantages.empty());
}

}  // namespace
}  // namespace tether
