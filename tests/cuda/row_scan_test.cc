#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// Tokens whose memory nobody reads: what the door refuses before anything is launched.
struct Unread {
  float number = 0;
  AdvantageArrays batch;

  Unread() {
    const ConstArray array{&number, DType::float32, 4, 1};
    batch = {.layout = {.rows = 2, .columns = 4},
             .rewards = array,
             .values = array,
             .response_mask = array,
             .log_ratios = array};
  }
  std::string run(const Recursion& recursion) {
    return message([&] {
      cuda::scan_rows("advantage", batch, recursion, {&number, DType::float32, 4, 1}, {}, nullptr);
    });
  }
};

struct Own {
  double gamma = 1;
  MaskGap gap = MaskGap::carry;
  template <class Number>
  TETHER_FORMULA Step<Number> step(const RecursionToken<Number>& token) const {
    return {token.reward, Number{0}, Number{gamma}};
  }
};

TEST(CudaRowScan, RefusesWhatHasNoKernelAndWhatIsMissing) {
  Unread unread;
  EXPECT_EQ(unread.run(Own{}),
            "advantage: estimator must be one of the catalogue on a CUDA device, got another type");
  EXPECT_EQ(unread.run(Gae{.gamma = 2}), "advantage: gamma must be in [0, 1], got 2");
  unread.batch.truncated = {&unread.number, DType::boolean, 4, 1};
  EXPECT_EQ(unread.run(Gae{}), "advantage: truncation_values must be given, got none");
  unread.batch.truncated.dtype = DType::int64;
  EXPECT_EQ(unread.run(Gae{}),
            "advantage: truncated must be float32, float64, bfloat16, float16 or boolean on a CUDA "
            "device, got int64");
  unread.batch.truncated = {};
  unread.batch.values.dtype = DType::boolean;
  EXPECT_EQ(unread.run(Gae{}),
            "advantage: values must be float32, float64, bfloat16 or float16 on a CUDA device, got "
            "boolean");
  unread.batch.values.dtype = DType::float32;
  unread.batch.values.data = nullptr;
  EXPECT_EQ(unread.run(Gae{}), "advantage: values must have memory on the device, got none");
  unread.batch.values = {};
  EXPECT_EQ(unread.run(Gae{}), "advantage: values must be given, got none");
  unread.batch.rewards = {};
  EXPECT_EQ(unread.run(Gae{}), "advantage: rewards must be given, got none");
}

// Without a driver a program with kernels starts, and a launch is one clear error.
TEST(CudaRowScan, EveryRecursionGetsAsFarAsTheLaunch) {
  Unread unread;
  int devices = 0;
  const bool has_driver = cudaGetDeviceCount(&devices) == cudaSuccess;
  for_each_recursion([&](const auto& row) {
    if (has_driver) return;
    EXPECT_THAT(unread.run(row.defaults),
                testing::StartsWith("advantage: CUDA must accept the launch, got "));
  });
  unread.batch.layout.columns = 0;  // tensors without elements have no memory
  unread.batch.values.data = nullptr;
  if (!has_driver) {
    EXPECT_THAT(unread.run(Gae{}),
                testing::StartsWith("advantage: CUDA must accept the launch, got "));
  }
  unread.batch.layout.rows = 0;
  EXPECT_EQ(unread.run(Gae{}), "no error");
}

}  // namespace
}  // namespace tether
