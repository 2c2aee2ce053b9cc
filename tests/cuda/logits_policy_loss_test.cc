#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "rl/catalogue.h"
#include "rl/kernels/logits_policy_loss_cuda.h"
#include "rl/weight_catalogue.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// Tokens with logits whose memory nobody reads: what the door refuses before anything is launched.
struct Unread {
  float number = 0;
  int64_t id = 0;
  double workspace[4] = {}, counts[3] = {};
  PolicyTotals totals;
  RowOptions options;
  PolicyArrays batch;
  ConstLogits logits{&number, DType::float32, 8, 5, 5};
  cuda::TokensOfLogits found{&number, &number};

  Unread() {
    const ConstArray array{&number, DType::float32, 4, 1};
    batch = {.layout = {.rows = 2, .columns = 4},
             .advantages = array,
             .response_mask = array,
             .old_logps = array,
             .rollout_logps = array};
  }
  std::string run(const PolicyObjective& objective) {
    return message([&] {
      cuda::policy_loss_of_logits(logits, &id, options, batch, objective, counts, 1, found,
                                  {&number, logits.dtype, 8, 5, 5}, &totals, workspace, nullptr);
    });
  }
};

TEST(CudaLogitsPolicyLoss, RefusesWhatNeedsMoreThanARow) {
  Unread unread;
  EXPECT_EQ(unread.run(presets::gspo()),
            "policy_loss_of_logits: level must be token where there are logits, got "
            "sequence_mean");
  EXPECT_EQ(unread.run(weighed(presets::grpo(), TvMask{})),
            "policy_loss_of_logits: weights must not look at the policy where there are logits, "
            "got one that does");
  unread.batch.old_logps = {};
  EXPECT_EQ(unread.run(weighed(presets::grpo(), RatioGate{})),
            "policy_loss_of_logits: old_logps must be given where there are weights and logits, "
            "got none");
}

TEST(CudaLogitsPolicyLoss, RefusesWhatIsMissingOrTooMuch) {
  Unread unread;
  PolicyObjective bonus = presets::grpo();
  bonus.entropy.coefficient = 0.1;
  unread.found.entropies = nullptr;
  EXPECT_EQ(unread.run(bonus),
            "policy_loss_of_logits: entropies must have memory where entropy_coef is not 0, got "
            "none");
  EXPECT_EQ(unread.run(presets::grpo(0.04)),
            "policy_loss_of_logits: ref_logps must be given when beta is greater than 0, got beta "
            "0.04 and none. Pass ref_logps or beta = 0");
  unread.found.logps = nullptr;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: logps must have memory on the device, got none");
  unread.logits.rows = 7;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: logits must have a row for each of 8 tokens, got 7");
  unread.logits.rows = 8;
  unread.found = {&unread.number, &unread.number, 1};
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: logits must have a row for each of 8 tokens, got 8");
  unread.batch.logps = unread.batch.advantages;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: logps and entropies must be none where there are logits, got "
            "an array");
  unread.options.temperature = 0;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: temperature must be in [1e-06, 1e+06], got 0");
}

TEST(CudaLogitsPolicyLoss, OtherTypesHaveNoKernel) {
  Unread unread;
  unread.batch.advantages.dtype = DType::float64;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: advantages must be float32, bfloat16 or float16 on a CUDA "
            "device, got float64");
  unread.batch.advantages.dtype = DType::float32;
  unread.logits.dtype = DType::float64;
  EXPECT_EQ(unread.run(presets::grpo()),
            "policy_loss_of_logits: logits must be float32, bfloat16 or float16 on a CUDA device, "
            "got float64");
}

TEST(CudaLogitsPolicyLoss, GetsAsFarAsTheLaunch) {
  Unread unread;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) GTEST_SKIP() << "there is a device";
  EXPECT_THAT(unread.run(presets::grpo()),
              testing::StartsWith("policy_loss_of_logits: CUDA must accept the launch, got "));
}

}  // namespace
}  // namespace tether
