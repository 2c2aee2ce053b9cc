#include "libtorch/policy_loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>

#include "libtorch/cuda/surrogate_table.h"
#include "rl/policy/importance.h"
#include "rl/policy/rejection.h"
#include "tests/cuda/host_surrogate.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"
#include "tests/rl/own_surrogate.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Every array; one row without tokens, NaN under the mask.
PolicyBatch batch_of(at::ScalarType dtype) {
  torch::manual_seed(5);
  const at::Tensor logps = -torch::randn({4, 9}).abs();
  const auto near = [&] { return logps + 0.2 * torch::randn({4, 9}); };
  PolicyBatch batch{.logps = logps.to(dtype),
                    .advantages = torch::randn({4}),
                    .response_mask = torch::rand({4, 9}) > 0.3,
                    .old_logps = near(),
                    .ref_logps = near().to(dtype),
                    .entropies = torch::rand({4, 9}).to(dtype),
                    .rollout_logps = near().t().contiguous().t(),
                    .kl_weights = torch::rand({4, 9})};
  batch.response_mask[2] = false;
  batch.logps.masked_fill_(batch.response_mask.logical_not(), kNaN);
  return batch;
}

// [N] of rows of 5, 0, 15 and 16 tokens.
PolicyBatch packed(PolicyBatch batch, at::ScalarType index) {
  for (const auto& each : PolicyBatch::arguments()) {
    at::Tensor& tensor = batch.*each.member;
    if (tensor.defined() && tensor.dim() == 2) tensor = tensor.flatten();
  }
  batch.offsets = at::tensor({0, 5, 5, 20, 36}, at::dtype(index));
  return batch;
}

// Loss, metrics and gradients, of an upstream one that is not 1.
Results evaluated(PolicyBatch batch, const PolicyObjective& objective,
                  const Normalizer& normalizer = {}) {
  batch.logps = batch.logps.detach().clone().requires_grad_();
  if (batch.entropies.defined()) {
    batch.entropies = batch.entropies.detach().clone().requires_grad_();
  }
  const LossOutput out = policy_loss(batch, objective, normalizer);
  (out.loss * 3).backward();
  return {out.loss.detach(), out.metrics.sums, out.metrics.maxima, batch.logps.grad(),
          batch.entropies.defined() ? batch.entropies.grad() : at::Tensor()};
}

// As far from its default as the kernels have it.
PolicyObjective with_every_term(PolicyObjective objective) {
  objective.kl.beta = 0.1;
  objective.entropy.coefficient = 0.05;
  return objective;
}

TEST(PolicyLossOnCuda, IsThatOfTheCpuForEveryObjective) {
  for (const auto& row : kCatalogue) {
    const PolicyObjective objective = with_every_term(row.preset());
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      const PolicyBatch batch = batch_of(dtype);
      expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, tolerance_of(dtype),
                       std::string(row.name));
    }
    for (const at::ScalarType index : {at::kInt, at::kLong}) {
      const PolicyBatch batch = packed(batch_of(at::kFloat), index);
      expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, 2e-5,
                       std::string(row.name) + ", packed");
    }
  }
}

TEST(PolicyLossOnCuda, IsThatOfTheCpuForEveryAggregationAndNormalizer) {
  const PolicyBatch batch = batch_of(at::kFloat);
  for (const Normalizer& normalizer :
       {Normalizer{}, Normalizer{.policy = 50, .kl = 40, .sequences = 7, .world_size = 4},
        Normalizer{.policy = 9, .sequences = 2, .scale = 0.5}}) {
    for (const Aggregation& aggregation :
         {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
          sequence_sum_over_constant(30), token_sum()}) {
      PolicyObjective objective = with_every_term(presets::gspo());
      objective.aggregation = aggregation;
      objective.weights.emplace_back(TruncatedImportance{.low = 0, .high = 1.01});
      objective.weights.emplace_back(RatioGate{.high = 1.2});
      expect_as_on_cpu([&] { return evaluated(batch, objective, normalizer); }, 1, 2e-5,
                       "an aggregation");
    }
  }
}

TEST(PolicyLossOnCuda, IsThatOfTheCpuAtLevelsOfTurns) {
  for (const at::ScalarType index : {at::kInt, at::kLong}) {
    PolicyBatch batch = batch_of(at::kFloat);
    batch.turn_ids = at::tensor({0, 0, 2, 2, 2, 5, 6, 6, 6}, at::dtype(index)).expand({4, 9});
    PolicyBatch by_runs = batch;
    by_runs.turn_ids.reset();
    for (const RatioLevel level :
         {RatioLevel::turn_mean, RatioLevel::turn_token, RatioLevel::turn_sum}) {
      PolicyObjective objective = with_every_term(presets::grpo());
      objective.level = level;
      objective.weights.emplace_back(RatioGate{.high = 1.2}, WeightLevel::turn_max);
      objective.weights.emplace_back(TruncatedImportance{.high = 1.01}, WeightLevel::turn_mean);
      for (const PolicyBatch& each : {batch, by_runs, packed(by_runs, index)}) {
        expect_as_on_cpu([&] { return evaluated(each, objective); }, 1, 2e-5, "turns");
      }
    }
  }
}

TEST(PolicyLossOnCuda, IsThatOfTheCpuForMasksOfIntegersAndEmptyBatches) {
  PolicyBatch batch = batch_of(at::kFloat);
  batch.response_mask = batch.response_mask.to(at::kLong);
  batch.entropies.reset();
  expect_as_on_cpu([&] { return evaluated(batch, presets::grpo(0.1)); }, 1, 2e-5, "integers");
  const at::Tensor none = torch::zeros({0, 9});
  const PolicyBatch empty{.logps = none, .advantages = none, .response_mask = none};
  expect_as_on_cpu([&] { return evaluated(empty, presets::ppo()); }, 1, 0, "no rows");
}

TEST(PolicyLossOnCuda, WithoutAGradientNoneIsStored) {
  const PolicyBatch batch = batch_of(at::kFloat);
  const auto constant = [&]() -> Results {
    const LossOutput out = policy_loss(batch, presets::ppo());
    EXPECT_FALSE(out.loss.requires_grad());
    return {out.loss, out.metrics.sums, out.metrics.maxima};
  };
  expect_as_on_cpu(constant, 1, 2e-5, "constants");
  const c10::InferenceMode inference;
  expect_as_on_cpu(constant, 1, 2e-5, "of inference mode");
}

// Another type than that of the test below.
struct Registered : OwnSurrogate {};

TEST(PolicyLossOnCuda, TakesFormulasOfAUsersThatHaveKernels) {
  EXPECT_FALSE(has_cuda_kernels(typeid(Registered)));
  add_cuda_kernels(typeid(Registered), cuda::kernels_on_host<Registered>());
  EXPECT_TRUE(has_cuda_kernels(typeid(Registered)));
  const PolicyBatch batch = batch_of(at::kFloat);
  for (const RatioLevel level :
       {RatioLevel::token, RatioLevel::sequence_mean, RatioLevel::turn_mean}) {
    PolicyObjective objective = with_every_term(presets::grpo());
    objective.level = level;
    objective.surrogate = Registered{{.strength = 0.7}};
    expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, 2e-5,
                     "a formula of one's own");
  }
}

// What the kernels leave is as torch's operations have it, bit for bit.
void expect_by_torch(const PolicyBatch& batch, const PolicyObjective& objective,
                     const char* reason) {
  const LossOutput want = detail::policy_loss_any_device(batch, objective);
  const OnCuda door;
  const LossOutput got = policy_loss(batch, objective);
  EXPECT_EQ(door.taken(), 0) << reason;
  EXPECT_TRUE(at::equal(got.loss, want.loss)) << reason;
  EXPECT_TRUE(at::equal(got.metrics.sums, want.metrics.sums)) << reason;
}

TEST(PolicyLossOnCuda, TakesTorchWhereThereIsNoKernel) {
  const PolicyBatch batch = packed(batch_of(at::kFloat), at::kLong);
  PolicyObjective objective = presets::gspo();
  objective.kl = {.beta = 0.1, .correction = KlCorrection::level_ratio};
  expect_by_torch(batch, objective, "level_ratio");
  objective = presets::ppo();
  objective.surrogate = on_any_device(OwnSurrogate{});
  expect_by_torch(batch, objective, "a surrogate of one's own");
  PolicyBatch wide = batch;
  wide.logps = batch.logps.to(at::kDouble);
  expect_by_torch(wide, presets::ppo(), "float64");
}

TEST(PolicyLossOnCuda, LooksAtOffsetsWhereTorchDoes) {
  PolicyBatch batch = packed(batch_of(at::kFloat), at::kLong);
  batch.offsets = at::tensor({0, 5, 5, 20, 20});
  const OnCuda door;
  EXPECT_EQ(message([&] { policy_loss(batch, presets::ppo()); }), "no error");
  EXPECT_EQ(door.taken(), 1);
  PolicyObjective by_torch = presets::ppo();
  by_torch.surrogate = on_any_device(OwnSurrogate{});
  EXPECT_EQ(message([&] { policy_loss(batch, by_torch); }),
            "policy_loss: offsets must run from 0 to 36, the size of logps, got 0 to 20");
}

TEST(PolicyLossOnCuda, RefusesWithTheSentenceOfTheCpu) {
  PolicyBatch batch = batch_of(at::kFloat);
  const auto said = [&](const PolicyObjective& objective, const Normalizer& normalizer) {
    return message([&] { policy_loss(batch, objective, normalizer); });
  };
  const auto expect_same_sentence = [&](const PolicyObjective& objective,
                                        const Normalizer& normalizer) {
    const std::string want = said(objective, normalizer);
    EXPECT_NE(want, "no error");
    const OnCuda door;
    EXPECT_EQ(said(objective, normalizer), want);
  };
  expect_same_sentence(presets::ppo(), {.sequences = 3});
  expect_same_sentence(presets::ppo({.epsilon_low = -1}), {});
  batch.ref_logps.reset();
  expect_same_sentence(presets::grpo(0.1), {});
  batch.advantages = torch::zeros({3});
  expect_same_sentence(presets::ppo(), {});
}

PolicyObjective gated_by_turns() {
  PolicyObjective objective = presets::ppo();
  objective.weights.emplace_back(RatioGate{.high = 1.05}, WeightLevel::turn_mean);
  return objective;
}

TEST(LocalCountsOnCuda, AreThoseOfTheCpu) {
  for (const at::ScalarType index : {at::kInt, at::kLong}) {
    const PolicyBatch batch = packed(batch_of(at::kFloat), index);
    for (const PolicyObjective& objective :
         {presets::ppo(), weighed(presets::ppo(), RatioGate{.high = 1.05}), gated_by_turns()}) {
      const auto counts = [&]() -> Results {
        const Normalizer found = local_counts(batch, objective);
        return {at::tensor({*found.policy, *found.kl, *found.sequences})};
      };
      expect_as_on_cpu(counts, 1, 0, "counts");
    }
  }
}

// Tensors without memory: whoever looks into one throws.
TEST(PolicyLossOnCuda, TheDoorWaitsForNothing) {
  detail::CudaKernels kernels = detail::kCudaKernels;
  kernels.policy_loss = [](const PolicyBatch& batch, const PolicyObjective&, const Normalizer&,
                           detail::WantedGradients) -> std::optional<detail::ComputedLoss> {
    return detail::ComputedLoss{at::empty({}, batch.logps.options()),
                                at::empty_like(batch.logps),
                                at::empty_like(batch.entropies),
                                {}};
  };
  PolicyBatch batch = packed(batch_of(at::kFloat), at::kLong);
  batch.response_mask = batch.response_mask.to(at::kLong);
  for (const auto& each : PolicyBatch::arguments()) {
    at::Tensor& tensor = batch.*each.member;
    if (tensor.defined()) tensor = tensor.to(at::kMeta);
  }
  batch.offsets = batch.offsets.to(at::kMeta);
  const OnCuda door(kernels);
  EXPECT_TRUE(policy_loss(batch, presets::grpo(0.1)).loss.is_meta());
  kernels.policy_loss = [](const PolicyBatch&, const PolicyObjective&, const Normalizer&,
                           detail::WantedGradients) {
    return std::optional<detail::ComputedLoss>();
  };
  EXPECT_THROW(policy_loss(batch, presets::grpo(0.1)), c10::Error);  // torch's way looks at offsets
}

}  // namespace
}  // namespace tether
