#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "logits/rows_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// Doors of the CUDA kernels: what they refuse before anything is launched.
TEST(CudaRows, RefuseWhatHasNoKernel) {
  float number = 0;
  ConstLogits logits{&number, DType::float32, 1, 8, 8};
  const auto statistics = [&](const RowOptions& options, const cuda::RowResults& results = {}) {
    return message([&] { cuda::row_statistics(logits, nullptr, options, results, nullptr); });
  };
  EXPECT_EQ(statistics({.temperature = 0}),
            "row_statistics: temperature must be in [1e-06, 1e+06], got 0");
  EXPECT_EQ(statistics({.first_id = 9, .ids = 16}),
            "row_statistics: first_id must be in [0, 8], got 9");
  EXPECT_EQ(statistics({.first_id = 1}), "row_statistics: first_id must be in [0, 0], got 1");
  EXPECT_EQ(statistics({}, {.mean_logits = &number}),
            "row_statistics: sums must be all for sums_of_squared_p and mean_logits, got less");
  EXPECT_EQ(message([&] {
              cuda::row_gradients(logits, nullptr, {}, nullptr, nullptr, nullptr, {}, nullptr);
            }),
            "row_gradients: states must have memory on the device, got none");
  logits.dtype = DType::float64;
  EXPECT_EQ(statistics({}),
            "row_statistics: logits must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
  logits.vocabulary = 0;
  EXPECT_EQ(statistics({}), "row_statistics: logits must have a vocabulary of at least 1, got 0");
}

// Without a driver a program with kernels starts, and a launch is one clear error.
TEST(CudaRows, NoRowsNeedNoDriver) {
  const ConstLogits none{nullptr, DType::float32, 0, 8, 8};
  cuda::row_statistics(none, nullptr, {}, {}, nullptr);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return;
  const float number = 0;
  const ConstLogits one{&number, DType::float32, 1, 1, 1};
  EXPECT_THAT(message([&] { cuda::row_statistics(one, nullptr, {}, {}, nullptr); }),
              testing::StartsWith("row_statistics: CUDA must accept the launch, got "));
}

}  // namespace
}  // namespace tether
