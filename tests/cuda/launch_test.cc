#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "core/cuda_launch.h"

namespace tether {
namespace {

TEST(CudaLaunch, AKernelKnowsClustersWhereItWasCompiledForThem) {
  EXPECT_TRUE(cuda::knows_clusters(true, 90));
  EXPECT_TRUE(cuda::knows_clusters(true, 120));
  EXPECT_FALSE(cuda::knows_clusters(true, 89));  // by the driver, from PTX
  EXPECT_FALSE(cuda::knows_clusters(true, 80));
  EXPECT_FALSE(cuda::knows_clusters(false, 90));
  EXPECT_FALSE(cuda::knows_clusters(true, 0));  // nothing is known of it
}

void no_kernel(int) {}

TEST(CudaLaunch, WhatIsNoKernelHasNoClustersAndLeavesNoErrorOfItsOwn) {
  const cudaError_t before = cudaGetLastError();  // without a driver there always is one
  EXPECT_FALSE(cuda::has_clusters(&no_kernel));
  EXPECT_EQ(cudaGetLastError(), before);
}

// {first task, blocks} of each launch.
std::vector<std::pair<int64_t, int64_t>> grids_of(int64_t tasks, int64_t blocks_of_each) {
  std::vector<std::pair<int64_t, int64_t>> found;
  cuda::for_each_grid(tasks, blocks_of_each,
                      [&](int64_t first, unsigned blocks) { found.emplace_back(first, blocks); });
  return found;
}

// A grid has at most 2^31 - 1 blocks.
TEST(CudaLaunch, MoreTasksThanAGridHolds) {
  using Grids = std::vector<std::pair<int64_t, int64_t>>;
  const int64_t tasks = 2147483648 + 5;
  EXPECT_EQ(grids_of(tasks, 1), (Grids{{0, 2147483647}, {2147483647, 6}}));
  // 268435455 tasks of 8 blocks at once; 13 are left.
  Grids eight;
  for (int64_t i = 0; i < 8; ++i) eight.emplace_back(i * 268435455, 2147483640);
  eight.emplace_back(2147483640, 13 * 8);
  EXPECT_EQ(grids_of(tasks, 8), eight);
  EXPECT_EQ(grids_of(0, 8), Grids{});
}

}  // namespace
}  // namespace tether
