#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "rl/catalogue.h"
#include "rl/kernels/policy_loss_cuda.h"
#include "tests/error_message.h"
#include "tests/rl/own_surrogate.h"

tether::Surrogate made_beside_its_kernels(double strength);  // own_surrogate.cu

namespace tether {
namespace {

// Tokens whose memory nobody reads: what the doors refuse before anything is launched.
struct Unread {
  float number = 0;
  double workspace[4] = {}, counts[3] = {};
  PolicyTotals totals;
  PolicyArrays batch;

  Unread() {
    const ConstArray array{&number, DType::float32, 4, 1};
    batch = {.layout = {.rows = 2, .columns = 4},
             .logps = array,
             .advantages = array,
             .response_mask = array,
             .old_logps = array,
             .ref_logps = array,
             .rollout_logps = array};
  }
  std::string run(const PolicyObjective& objective) {
    return message(
        [&] { cuda::policy_loss(batch, objective, counts, 1, {}, &totals, workspace, nullptr); });
  }
};

TEST(CudaPolicyLoss, RefusesWhatHasNoKernel) {
  Unread unread;
  PolicyObjective objective = presets::grpo();
  objective.kl = {.beta = 0.1, .correction = KlCorrection::level_ratio};
  for (const RatioLevel level :
       {RatioLevel::sequence_mean, RatioLevel::turn_mean, RatioLevel::turn_sum}) {
    objective.level = level;
    EXPECT_FALSE(cuda::is_supported(unread.batch, objective));
    EXPECT_EQ(unread.run(objective),
              "policy_loss: kl_correction must not be level_ratio where tokens share their ratio "
              "on a CUDA device, got it");
  }
  unread.batch.turn_ids = unread.batch.logps;
  EXPECT_EQ(unread.run(presets::ppo()),
            "policy_loss: turn_ids must be int32 or int64 on a CUDA device, got float32");
  unread.batch.turn_ids.dtype = DType::int32;
  unread.batch.turn_ids.data = nullptr;
  EXPECT_EQ(unread.run(presets::ppo()),
            "policy_loss: turn_ids must have memory on the device, got none");
  unread.batch.turn_ids = {};
  unread.batch.logps.dtype = DType::float64;
  EXPECT_EQ(unread.run(presets::ppo()),
            "policy_loss: logps must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
  unread.batch.logps.dtype = DType::float32;
  unread.batch.response_mask.dtype = DType::int32;
  EXPECT_EQ(unread.run(presets::ppo()),
            "policy_loss: response_mask must be float32, float64, bfloat16, float16 or boolean on "
            "a CUDA device, got int32");
}

struct Own {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return -token.advantage * token.logp;
  }
};
struct OwnWeight {
  template <class Number>
  TETHER_FORMULA Number measure(const WeightToken<Number>& token) const {
    return token.old_logp;
  }
  template <class Number>
  TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& statistic) const {
    return statistic;
  }
};
struct OwnForm {
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return d * d;
  }
};

TEST(CudaPolicyLoss, RefusesFormulasThatItWasNotCompiledWith) {
  Unread unread;
  EXPECT_EQ(
      unread.run({.surrogate = Own{}}),
      "policy_loss: surrogate must be one of the catalogue or of a TETHER_CUDA_SURROGATE on a "
      "CUDA device, got another type");
  PolicyObjective objective = weighed(presets::ppo(), OwnWeight{});
  EXPECT_EQ(unread.run(objective),
            "policy_loss: weights must be those of the catalogue on a CUDA device, got another "
            "type");
  objective = presets::grpo(0.04);
  objective.kl.estimator = OwnForm{};
  EXPECT_EQ(unread.run(objective),
            "policy_loss: kl_estimator and kl_gradient must be forms of the catalogue on a CUDA "
            "device, got another type");
}

TEST(CudaPolicyLoss, RefusesWhatIsMissing) {
  Unread unread;
  EXPECT_EQ(message([&] {
              cuda::policy_loss(unread.batch, presets::ppo(), unread.counts, 1, {}, &unread.totals,
                                nullptr, nullptr);
            }),
            "policy_loss: workspace must have memory on the device, got none");
  EXPECT_EQ(message([&] {
              cuda::local_counts(unread.batch, presets::ppo(), nullptr, unread.workspace, nullptr);
            }),
            "local_counts: counts must have memory on the device, got none");
  const auto with_gradients = [&](const PolicyGradients& gradients) {
    return message([&] {
      cuda::policy_loss(unread.batch, presets::ppo(), unread.counts, 1, gradients, &unread.totals,
                        unread.workspace, nullptr);
    });
  };
  EXPECT_EQ(with_gradients({.logps = {unread.workspace, DType::float64, 4, 1}}),
            "policy_loss: dlogps must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
  EXPECT_EQ(with_gradients({.entropies = {unread.workspace, DType::float32, 4, 1}}),
            "policy_loss: dentropies must be none without entropies, got an array");
  unread.batch.ref_logps = {};
  EXPECT_EQ(unread.run(presets::grpo(0.04)),
            "policy_loss: ref_logps must be given when beta is greater than 0, got beta 0.04 and "
            "none. Pass ref_logps or beta = 0");
  unread.batch.advantages.data = nullptr;
  EXPECT_EQ(unread.run(presets::ppo()),
            "policy_loss: advantages must have memory on the device, got none");
  unread.batch.advantages = {};
  EXPECT_EQ(unread.run(presets::ppo()), "policy_loss: advantages must be given, got none");
}

// own_surrogate.cu has its kernels.
TEST(CudaPolicyLoss, TakesFormulasWithKernelsOfAUsers) {
  Unread unread;
  PolicyObjective objective = presets::grpo(0.04);
  for (const Surrogate& own : {Surrogate(OwnSurrogate{}), made_beside_its_kernels(0.5)}) {
    objective.surrogate = own;
    EXPECT_TRUE(cuda::is_supported(unread.batch, objective));
    EXPECT_EQ(message([&] { cuda::check_supported("f", unread.batch, objective); }), "no error");
  }
  objective.surrogate = made_beside_its_kernels(11);
  EXPECT_EQ(message([&] { cuda::check_supported("f", unread.batch, objective); }),
            "f: strength must be in [0, 10], got 11");
}

// Every row of the catalogue gets as far as the launch.
TEST(CudaPolicyLoss, HasAKernelForEveryRowOfTheCatalogue) {
  Unread unread;
  for (const CatalogueRow& row : kCatalogue) {
    EXPECT_EQ(message([&] { cuda::check_supported("f", unread.batch, row.preset()); }), "no error")
        << row.name;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return;
  PolicyObjective of_turns = presets::ppo();
  for (const RatioLevel level :
       {RatioLevel::token, RatioLevel::turn_mean, RatioLevel::turn_token, RatioLevel::turn_sum}) {
    of_turns.level = level;
    EXPECT_THAT(unread.run(of_turns),
                testing::StartsWith("policy_loss: CUDA must accept the launch, got "));
  }
}

TEST(CudaPolicyLoss, TheWorkspaceHoldsARowOfTotalsAndTwoNumbersAToken) {
  Unread unread;
  constexpr int64_t kBytes = 32 + 2 * 20 * 8 + 2 * 8 * 4;
  EXPECT_EQ(cuda::policy_workspace_bytes(unread.batch, presets::ppo()), kBytes);
  // And a count a row, a place and four numbers a token.
  constexpr int64_t kOfTurns = 2 * 8 + 8 * (8 + 4 * 4);
  PolicyObjective objective = presets::ppo();
  objective.level = RatioLevel::turn_mean;
  EXPECT_EQ(cuda::policy_workspace_bytes(unread.batch, objective), kBytes + kOfTurns);
  objective = presets::ppo();
  objective.weights.emplace_back(TruncatedImportance{}, WeightLevel::turn_max);
  EXPECT_EQ(cuda::policy_workspace_bytes(unread.batch, objective), kBytes + kOfTurns);
}

}  // namespace
}  // namespace tether
