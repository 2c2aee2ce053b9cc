#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "logits/support_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// What the doors refuse before anything is launched.
TEST(CudaSupport, RefusesWhatHasNoKernel) {
  float number = 0;
  const int64_t id = 0;
  ConstLogits logits{&number, DType::float32, 1, 8, 8};
  KeptIds kept{{.rows = 1, .columns = 1}, {&id, DType::int64, 1, 1}};
  const auto statistics = [&](const RowOptions& options = {}) {
    return message([&] { cuda::support_statistics(logits, nullptr, kept, options, {}, nullptr); });
  };
  EXPECT_EQ(statistics({.temperature = 0}),
            "support_statistics: temperature must be in [1e-06, 1e+06], got 0");
  kept.layout.rows = 2;
  EXPECT_EQ(statistics(), "support_statistics: ids must be of 1 rows like the logits, got 2");
  kept.layout.rows = 1;
  kept.ids.dtype = DType::float32;
  EXPECT_EQ(statistics(), "support_statistics: ids must be int32 or int64, got float32");
  kept.ids = {nullptr, DType::int32, 1, 1};
  EXPECT_EQ(statistics(), "support_statistics: ids must have memory on the device, got none");
  kept.ids.data = &id;
  const cuda::RowState state{};
  const MutableLogits out{&number, DType::float32, 1, 8, 8};
  EXPECT_EQ(message([&] {
              cuda::support_gradients(logits, nullptr, kept, {}, &state, nullptr, nullptr, nullptr,
                                      out, nullptr);
            }),
            "support_gradients: kept_logits must have memory on the device, got none");
  EXPECT_EQ(message([&] {
              cuda::support_kl(logits, logits, kept, 1, nullptr, {}, {}, nullptr, out, {}, nullptr);
            }),
            "support_kl: kept_logits must have memory on the device, got none");
  logits.dtype = DType::float64;
  EXPECT_EQ(statistics(),
            "support_statistics: logits must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
}

TEST(CudaSupport, NoRowsNeedNoDriver) {
  const ConstLogits none{nullptr, DType::float32, 0, 8, 8};
  const KeptIds kept{{.rows = 0, .columns = 1}, {nullptr, DType::int64, 1, 1}};
  cuda::support_statistics(none, nullptr, kept, {}, {}, nullptr);
  cuda::support_gradients(none, nullptr, kept, {}, nullptr, nullptr, nullptr, nullptr, {}, nullptr);
  cuda::support_kl(none, none, kept, 1, nullptr, {}, {}, nullptr, {}, {}, nullptr);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return;
  const float number = 0;
  const int64_t id = 0;
  const ConstLogits one{&number, DType::float32, 1, 1, 1};
  const KeptIds of_one{{.rows = 1, .columns = 1}, {&id, DType::int64, 1, 1}};
  EXPECT_THAT(message([&] { cuda::support_statistics(one, nullptr, of_one, {}, {}, nullptr); }),
              testing::StartsWith("support_statistics: CUDA must accept the launch, got "));
}

}  // namespace
}  // namespace tether
