#include "estimators/advantage/whitening_program.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/host_team.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, beside the CPU kernels.

namespace tether {
namespace {

using Doubles = std::vector<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
using Team = HostTeam<cuda::kWhiteningThreads>;

// NaN in masked slots; weights of 1/2.
struct Values {
  int64_t rows, columns;
  Doubles values, mask;

  Values(int64_t row_count, int64_t column_count, double mean, double spread)
      : rows(row_count), columns(column_count) {
    std::mt19937 random(4);
    std::normal_distribution<double> normal(mean, spread);
    for (int64_t i = 0; i < rows * columns; ++i) {
      mask.push_back(static_cast<double>(random() % 3) / 2);
      values.push_back(mask.back() != 0 ? normal(random) : kNan);
    }
  }
  WhiteningArrays arrays() const {
    const auto view = [&](const Doubles& of) {
      return ConstArray{of.data(), DType::float64, columns, 1};
    };
    return {{.rows = rows, .columns = columns}, view(values), view(mask)};
  }
};

Moments moments_by_program(const WhiteningArrays& batch, bool backwards = false) {
  const Team team{backwards};
  const int64_t pieces = cuda::pieces_of_rows(batch.layout);
  std::vector<Moments> parts(static_cast<size_t>(batch.layout.rows * pieces));
  for (size_t i = 0; i < parts.size(); ++i) {
    cuda::moments_program(team, batch, pieces, static_cast<int64_t>(i), parts.data());
  }
  Moments out;
  cuda::merge_moments_program(team, parts.data(), static_cast<int64_t>(parts.size()), &out);
  return out;
}

Doubles whiten_by_program(const WhiteningArrays& batch, const Moments& step,
                          const Whitening& options, int64_t columns) {
  Doubles out(static_cast<size_t>(batch.layout.rows * columns), 7);
  const int64_t pieces = cuda::pieces_of_rows(batch.layout);
  const cuda::WhiteningParameters in{
      batch, {out.data(), DType::float64, columns, 1}, options.epsilon, options.shift_mean, pieces};
  for (int64_t i = 0; i < batch.layout.rows * pieces; ++i) {
    cuda::whitening_program(Team{}, in, &step, i);
  }
  return out;
}

TEST(WhiteningProgram, IsTheCpuKernel) {
  for (const auto& [rows, columns] : {std::pair{7, 400}, {2, 70001}, {300, 1}, {3, 0}}) {
    const Values batch(rows, columns, 1000, 0.01);
    const Moments want = moments(batch.arrays()), got = moments_by_program(batch.arrays(), true);
    EXPECT_EQ(got.count, want.count);
    EXPECT_NEAR(got.mean, want.mean, 1e-12 * std::abs(want.mean));
    EXPECT_NEAR(got.squares, want.squares, 1e-9 * want.squares);
    for (const Whitening& options : {Whitening{}, {.epsilon = 0.1, .shift_mean = false}}) {
      Doubles expected(batch.values.size(), kNan);
      whiten(batch.arrays(), want, options, {expected.data(), DType::float64, columns, 1});
      const Doubles out = whiten_by_program(batch.arrays(), want, options, columns);
      for (size_t i = 0; i < out.size(); ++i) {
        ASSERT_NEAR(out[i], expected[i], 1e-13 * (1 + std::abs(expected[i]))) << i;
      }
    }
  }
}

TEST(WhiteningProgram, EqualValuesAreExactlyZero) {
  Values batch(5, 3000, 0, 1);
  for (size_t i = 0; i < batch.values.size(); ++i) {
    if (batch.mask[i] != 0) batch.values[i] = 0.1;
  }
  const Moments step = moments_by_program(batch.arrays());
  EXPECT_EQ(step.variance(), 0);
  for (double each : whiten_by_program(batch.arrays(), step, {.epsilon = 0}, 3000)) {
    EXPECT_EQ(each, 0);
  }
}

TEST(WhiteningProgram, PackedRowsAndBrokenNumbers) {
  Values batch(1, 5000, 3, 2);
  const std::vector<int64_t> offsets{100, 100, 4000, 4900};
  WhiteningArrays packed = batch.arrays();
  packed.layout = {.rows = 3, .offsets64 = offsets.data()};
  const Moments want = moments(packed);
  const Moments got = moments_by_program(packed);
  EXPECT_EQ(got.count, want.count);
  EXPECT_NEAR(got.squares, want.squares, 1e-9 * want.squares);
  batch.mask[0] = 2;
  batch.values[0] = 1;
  EXPECT_TRUE(std::isnan(moments_by_program(batch.arrays()).mean));
  EXPECT_TRUE(std::isnan(whiten_by_program(batch.arrays(), want, {}, 5000)[0]));
  batch.mask[0] = 1;
  batch.values[0] = kNan;
  EXPECT_TRUE(std::isnan(moments_by_program(batch.arrays()).squares));
}

TEST(WhiteningProgram, RealThreadsHaveTheSameBits) {
  using Threads = ThreadTeam<cuda::kWhiteningThreads>;
  const Values batch(2, 900, 3, 2);
  const WhiteningArrays arrays = batch.arrays();
  std::vector<Moments> parts(2), want(2);
  Threads::run(2, [&](const Threads& team, int i) {
    cuda::moments_program(team, arrays, 1, i, parts.data());
  });
  for (int64_t i = 0; i < 2; ++i) cuda::moments_program(Team{}, arrays, 1, i, want.data());
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(parts[i].mean, want[i].mean);
    EXPECT_EQ(parts[i].squares, want[i].squares);
  }
}

}  // namespace
}  // namespace tether
