#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/whitening_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

struct Own {
  NanReward nan_reward = NanReward::error;
  Group::Number operator()(const Group& group, int64_t i) const { return group.reward[i]; }
};

// What the doors refuse before anything is launched.
TEST(CudaGroups, RefuseWhatHasNoKernelAndWhatIsMissing) {
  float number = 0;
  const int64_t id = 0;
  cuda::GroupBatch batch{.rewards = &number, .group_size = 2, .count = 4};
  const auto run = [&](const GroupRule& rule) {
    return message([&] { cuda::advantages_of_groups("advantage", batch, rule, &number, nullptr); });
  };
  EXPECT_EQ(run(Own{}),
            "advantage: estimator must be one of the catalogue on a CUDA device, got another type");
  EXPECT_EQ(run(Opo{}), "advantage: lengths must be given, got none");
  EXPECT_EQ(run(GroupAdvantage{.epsilon = -1}), "advantage: epsilon must be in [0, 1e+12], got -1");
  batch.count = 3;
  EXPECT_EQ(run(GroupAdvantage{}),
            "advantage: rewards must divide into groups of 2, got 3. Pass group ids for ragged "
            "groups");
  batch.group_ids = &id;
  EXPECT_EQ(run(GroupAdvantage{}), "advantage: group_size must be 0 beside group_ids, got 2");
  batch.group_size = 0;
  batch.rewards = nullptr;
  EXPECT_EQ(run(GroupAdvantage{}), "advantage: rewards must have memory on the device, got none");
  batch.count = 0;
  EXPECT_EQ(run(GroupAdvantage{}), "no error");
}

TEST(CudaGroups, EveryRuleGetsAsFarAsTheLaunch) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) GTEST_SKIP() << "there is a device";
  float number = 0;
  for_each_group_rule([&](const auto& row) {
    EXPECT_THAT(message([&] {
                  cuda::advantages_of_groups(
                      "advantage",
                      {.rewards = &number, .lengths = &number, .group_size = 1, .count = 1},
                      row.defaults, &number, nullptr);
                }),
                testing::StartsWith("advantage: CUDA must accept the launch, got "));
  });
}

TEST(CudaWhitening, RefusesWhatIsMissing) {
  float number = 0;
  Moments step;
  const ConstArray array{&number, DType::float32, 4, 1};
  WhiteningArrays batch{{.rows = 1, .columns = 4}, array, array};
  EXPECT_EQ(message([&] { cuda::moments(batch, nullptr, &step, nullptr); }),
            "moments: workspace must have memory on the device, got none");
  EXPECT_EQ(message([&] { cuda::merge_moments(nullptr, 2, &step, nullptr); }),
            "moments: parts must have memory on the device, got none");
  EXPECT_EQ(message([&] { cuda::whiten(batch, &step, {}, {}, nullptr); }),
            "whiten: out must be given, got none");
  EXPECT_EQ(
      message([&] { cuda::whiten(batch, nullptr, {}, {&number, DType::float32, 4, 1}, nullptr); }),
      "whiten: step must have memory on the device, got none");
  batch.values.dtype = DType::int64;
  EXPECT_EQ(message([&] { cuda::moments(batch, &step, &step, nullptr); }),
            "moments: values must be float32, float64, bfloat16 or float16 on a CUDA device, got "
            "int64");
  EXPECT_EQ(cuda::moments_workspace({.rows = 3, .columns = 2049}), 6);
}

}  // namespace
}  // namespace tether
