#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/cuda_numbers.h"
#include "tests/error_message.h"

namespace tether {
namespace {

TEST(CudaNumbers, AreOneToThreeInMemoryOfTheDevice) {
  double out[3] = {};
  const auto run = [&](const std::vector<double>& numbers, double* memory) {
    return message([&] { cuda::set_numbers("value_loss", numbers, memory, nullptr); });
  };
  EXPECT_EQ(run({}, out), "value_loss: numbers must be 1 to 3, got 0");
  EXPECT_EQ(run({1, 2, 3, 4}, out), "value_loss: numbers must be 1 to 3, got 4");
  EXPECT_EQ(run({1, 2}, nullptr), "value_loss: numbers must have memory on the device, got none");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) GTEST_SKIP() << "there is a device";
  EXPECT_THAT(run({1, 2}, out),
              testing::StartsWith("value_loss: CUDA must accept the launch, got "));
}

}  // namespace
}  // namespace tether
