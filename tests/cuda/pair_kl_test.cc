#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "logits/pair_kl_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// What the doors refuse before anything is launched.
TEST(CudaPairKl, RefusesWhatHasNoKernel) {
  float number = 0;
  ConstLogits q{&number, DType::float32, 1, 8, 8}, p = q;
  const auto values = [&](double temperature) {
    return message([&] { cuda::logits_kl(q, p, temperature, nullptr, {}, nullptr); });
  };
  EXPECT_EQ(values(0), "logits_kl: temperature must be in [1e-06, 1e+06], got 0");
  p.vocabulary = 9;
  EXPECT_EQ(values(1), "logits_kl: p must be [1, 8] of the type of q, got [1, 9]");
  p = q;
  p.dtype = DType::bfloat16;
  EXPECT_EQ(values(1), "logits_kl: p must be [1, 8] of the type of q, got [1, 8] of another type");
  p = q;
  p.data = nullptr;
  EXPECT_EQ(values(1), "logits_kl: p must have memory on the device, got none");
  q.dtype = p.dtype = DType::float64;
  EXPECT_EQ(values(1),
            "logits_kl: q must be float32, bfloat16 or float16 on a CUDA device, got float64");
  q.vocabulary = p.vocabulary = 0;
  EXPECT_EQ(message([&] { cuda::logits_kl_gradients(q, p, 1, nullptr, {}, {}, {}, {}, nullptr); }),
            "logits_kl_gradients: q must have a vocabulary of at least 1, got 0");
}

TEST(CudaPairKl, NoRowsNeedNoDriver) {
  const ConstLogits none{nullptr, DType::float32, 0, 8, 8};
  cuda::logits_kl(none, none, 1, nullptr, {}, nullptr);
  cuda::logits_kl_gradients(none, none, 1, nullptr, {}, {}, {}, {}, nullptr);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return;
  const float number = 0;
  const ConstLogits one{&number, DType::float32, 1, 1, 1};
  EXPECT_THAT(
      message([&] { cuda::logits_kl_gradients(one, one, 1, nullptr, {}, {}, {}, {}, nullptr); }),
      testing::StartsWith("logits_kl_gradients: CUDA must accept the launch, got "));
}

}  // namespace
}  // namespace tether
