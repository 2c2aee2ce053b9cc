// Losses of hidden states on the way of CUDA tensors.

#include "libtorch/linear_loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>
#include <vector>

#include "rl/policy/importance.h"
#include "rl/policy/rejection.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"
#include "tests/rl/own_surrogate.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kRows = 4, kColumns = 5, kHidden = 6, kVocabulary = 31;

// A row without tokens; NaN, and an id that is none, under the mask.
struct Inputs {
  at::Tensor hidden, weight, bias, targets;
  PolicyBatch batch;

  explicit Inputs(at::ScalarType dtype) {
    torch::manual_seed(12);
    hidden = (2 * torch::randn({kRows, kColumns, kHidden})).to(dtype);
    weight = torch::randn({kVocabulary, kHidden}).to(dtype);
    bias = torch::randn({kVocabulary}).to(dtype);
    targets = torch::randint(kVocabulary, {kRows, kColumns}, at::kLong);
    const at::Tensor logps = at::log_softmax(at::linear(hidden, weight, bias).to(at::kFloat), -1)
                                 .gather(-1, targets.unsqueeze(-1))
                                 .squeeze(-1);
    const auto near = [&] { return logps + 0.2 * torch::randn({kRows, kColumns}); };
    batch = {.logps = {},
             .advantages = torch::randn({kRows}),
             .response_mask = torch::rand({kRows, kColumns}) > 0.3,
             .old_logps = near(),
             .ref_logps = near(),
             .rollout_logps = near(),
             .kl_weights = torch::rand({kRows, kColumns})};
    batch.response_mask[2] = false;
    const at::Tensor masked = batch.response_mask.logical_not();
    hidden.masked_fill_(masked.unsqueeze(-1), kNaN);
    targets.masked_fill_(masked, int64_t{1} << 40);
    batch.old_logps.masked_fill_(masked, kNaN);
  }

  int64_t bytes(int64_t rows) const {
    return rows * kVocabulary * static_cast<int64_t>(weight.element_size());
  }
};

// [N] of rows of 5, 5, 0 and 10 tokens.
Inputs packed(Inputs in, at::ScalarType index) {
  in.hidden = in.hidden.flatten(0, 1);
  in.targets = in.targets.flatten();
  for (const auto& each : PolicyBatch::arguments()) {
    at::Tensor& tensor = in.batch.*each.member;
    if (tensor.defined() && tensor.dim() == 2) tensor = tensor.flatten();
  }
  in.batch.offsets = at::tensor({0, 5, 10, 10, 20}, at::dtype(index));
  return in;
}

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

// Loss, metrics, what is found of the tokens, and gradients, of an upstream one that is not 1.
Results evaluated(const Inputs& in, const PolicyObjective& objective, LinearOptions options = {},
                  const Normalizer& normalizer = {}) {
  options.row.temperature = 0.9;
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight), bias = leaf(in.bias);
  const LinearPolicyOutput out = linear_policy_loss(hidden, {weight, bias}, in.targets, in.batch,
                                                    objective, normalizer, options);
  (out.loss * 3).backward();
  EXPECT_FALSE(out.logps.requires_grad());
  return {out.loss.detach(), out.metrics.sums, out.metrics.maxima, out.logps,
          out.entropies,     hidden.grad(),    weight.grad(),      bias.grad()};
}

PolicyObjective with_every_term(PolicyObjective objective) {
  objective.kl.beta = 0.1;
  objective.entropy.coefficient = 0.05;
  return objective;
}

double tolerance_of_logits(at::ScalarType dtype) { return dtype == at::kFloat ? 3e-5 : 6e-2; }

// One walk: a call a chunk, then the loss. Else two calls a chunk.
int calls_of(const PolicyObjective& objective, int chunks) {
  bool one_walk = objective.level == RatioLevel::token;
  for (const TokenWeight& weight : objective.weights) {
    const auto& traits = weight.formula.traits();
    one_walk &= weight.level == WeightLevel::token && !traits.reads_policy && !traits.leaves;
  }
  return one_walk ? chunks + 1 : 2 * chunks + 1;
}

TEST(LinearPolicyLossOnCuda, IsThatOfTheCpuForEveryObjective) {
  for (const auto& row : kCatalogue) {
    const PolicyObjective objective = with_every_term(row.preset());
    const std::string name(row.name);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const Inputs in(dtype);
      expect_as_on_cpu([&] { return evaluated(in, objective); }, calls_of(objective, 1),
                       tolerance_of_logits(dtype), name);
      expect_as_on_cpu([&] { return evaluated(in, objective, {.chunk_bytes = in.bytes(7)}); },
                       calls_of(objective, 3), tolerance_of_logits(dtype), name + ", chunks");
    }
    const Inputs in = packed(Inputs(at::kFloat), at::kInt);
    expect_as_on_cpu([&] { return evaluated(in, objective, {.rows_per_chunk = 6}); },
                     calls_of(objective, 4), 3e-5, name + ", packed");
  }
}

TEST(LinearPolicyLossOnCuda, IsThatOfTheCpuForEveryAggregationAndNormalizer) {
  const Inputs in(at::kFloat);
  for (const Normalizer& normalizer :
       {Normalizer{}, Normalizer{.policy = 50, .kl = 40, .sequences = 7, .world_size = 4},
        Normalizer{.policy = 9, .sequences = 2, .scale = 0.5}}) {
    for (const Aggregation& aggregation :
         {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
          sequence_sum_over_constant(30), token_sum()}) {
      PolicyObjective objective = with_every_term(presets::ppo());
      objective.aggregation = aggregation;
      objective.weights.emplace_back(TruncatedImportance{.low = 0, .high = 1.01});
      expect_as_on_cpu(
          [&] { return evaluated(in, objective, {.chunk_bytes = in.bytes(7)}, normalizer); }, 4,
          3e-5, "an aggregation");
    }
  }
}

TEST(LinearPolicyLossOnCuda, HasTheLogpsOfOtherWeightsFirst) {
  const Inputs in(at::kFloat);
  const auto expect = [&](const PolicyObjective& objective, const Inputs& from, const char* name) {
    expect_as_on_cpu([&] { return evaluated(from, objective, {.chunk_bytes = in.bytes(7)}); }, 7,
                     3e-5, name);
  };
  PolicyObjective objective = presets::ppo();
  objective.weights.emplace_back(RatioGate{.high = 1.05});
  expect(objective, in, "a weight that takes tokens out");
  objective = presets::ppo();
  objective.weights.emplace_back(TruncatedImportance{}, WeightLevel::sequence_mean);
  expect(objective, in, "a weight of sequences");
}

TEST(LinearPolicyLossOnCuda, WithoutOldLogpsOrEntropies) {
  Inputs in(at::kFloat);
  in.batch.old_logps.reset();
  expect_as_on_cpu([&] { return evaluated(in, presets::ppo(), {.chunk_bytes = in.bytes(7)}); }, 4,
                   3e-5, "on policy");
  expect_as_on_cpu([&] { return evaluated(in, presets::ppo(), {.entropies = true}); }, 2, 3e-5,
                   "entropies as a metric");
}

TEST(LinearPolicyLossOnCuda, OfMasksOfIntegersAndOfNoTokens) {
  Inputs in(at::kFloat);
  in.batch.response_mask = in.batch.response_mask.to(at::kLong);
  expect_as_on_cpu([&] { return evaluated(in, presets::grpo(0.1)); }, 2, 3e-5, "integers");
  in.batch.response_mask.zero_();
  expect_as_on_cpu([&] { return evaluated(in, presets::grpo(0.1)); }, 2, 0, "all masked");
}

TEST(LinearPolicyLossOnCuda, OfFrozenInputs) {
  const Inputs in(at::kFloat);
  const auto run = [&]() -> Results {
    const at::Tensor weight = leaf(in.weight);
    const LinearPolicyOutput out =
        linear_policy_loss(in.hidden, {weight, in.bias}, in.targets, in.batch, presets::grpo(0.1),
                           {}, {.chunk_bytes = in.bytes(7)});
    out.loss.backward();
    const c10::InferenceMode inference;
    const LinearPolicyOutput constant =
        linear_policy_loss(in.hidden, {in.weight, in.bias}, in.targets, in.batch, presets::ppo());
    return {out.loss.detach(), weight.grad(), constant.loss, constant.logps};
  };
  expect_as_on_cpu(run, 6, 3e-5, "frozen");
}

// By chunks and then by torch's operations.
TEST(LinearPolicyLossOnCuda, TakesTheLogitsForTheLossOnlyWhereItHasAKernelOfThem) {
  const Inputs in = packed(Inputs(at::kFloat), at::kLong);
  PolicyObjective objective = presets::ppo();
  objective.surrogate = on_any_device(OwnSurrogate{});
  expect_as_on_cpu([&] { return evaluated(in, objective); }, 2, 3e-5, "a surrogate of one's own");
  objective = presets::ppo();
  objective.level = RatioLevel::turn_mean;
  expect_as_on_cpu([&] { return evaluated(in, objective); }, 3, 3e-5, "turns");
}

TEST(LinearPolicyLossOnCuda, AnIdOutOfRangeIsNaNForItsRowAndCounted) {
  Inputs in(at::kFloat);
  const at::Tensor place = in.batch.response_mask.nonzero()[1];
  const auto row = place[0].item<int64_t>(), column = place[1].item<int64_t>();
  for (const int64_t bad : {kVocabulary, int64_t{-1}, int64_t{1} << 40}) {
    in.targets[row][column] = bad;
    for (const PolicyObjective& objective : {presets::ppo(), presets::gspo()}) {
      const OnCuda door;
      const LinearPolicyOutput out =
          linear_policy_loss(in.hidden, {in.weight, in.bias}, in.targets, in.batch, objective);
      EXPECT_TRUE(out.loss.isnan().item<bool>());
      EXPECT_EQ(out.logps.isnan().sum().item<int64_t>(), 1);
      EXPECT_TRUE(out.logps[row][column].isnan().item<bool>());
      EXPECT_GE(out.metrics.to_map().at("nonfinite"), 1);
    }
  }
}

TEST(LinearPolicyLossOnCuda, RefusesWithTheSentenceOfTheCpu) {
  const Inputs good(at::kFloat);
  const auto said = [](const Inputs& in, const PolicyObjective& objective,
                       const Normalizer& normalizer) {
    return message([&] {
      linear_policy_loss(in.hidden, {in.weight, in.bias}, in.targets, in.batch, objective,
                         normalizer);
    });
  };
  const auto expect = [&](const Inputs& in, const PolicyObjective& objective,
                          const Normalizer& normalizer) {
    const std::string want = said(in, objective, normalizer);
    EXPECT_EQ(want.substr(0, 20), "linear_policy_loss: ");
    const OnCuda door;
    EXPECT_EQ(said(in, objective, normalizer), want);
  };
  for (const PolicyObjective& objective : {presets::ppo(), presets::gspo()}) {
    expect(good, objective, {.world_size = 0});
    expect(good, objective, {.policy = -1});
    Inputs bad = good;
    bad.batch.advantages = torch::zeros({3});
    expect(bad, objective, {});
    bad = good;
    bad.batch.logps = good.batch.old_logps;
    expect(bad, objective, {});
    bad = good;
    bad.batch.ref_logps.reset();
    expect(bad, with_every_term(objective), {});
  }
}

TEST(LinearPolicyLossOnCuda, LooksAtOffsetsWhereTorchDoes) {
  Inputs in = packed(Inputs(at::kFloat), at::kLong);
  in.batch.offsets = at::tensor({0, 5, 10, 10, 19});
  const auto said = [&](const PolicyObjective& objective) {
    return message([&] {
      linear_policy_loss(in.hidden, {in.weight, in.bias}, in.targets, in.batch, objective);
    });
  };
  const OnCuda door;
  EXPECT_EQ(said(presets::ppo()), "no error");
  EXPECT_EQ(said(presets::gspo()), "no error");
  PolicyObjective own = presets::ppo();
  own.surrogate = on_any_device(OwnSurrogate{});
  EXPECT_EQ(said(own),
            "linear_policy_loss: offsets must run from 0 to 20, the size of logps, got 0 to 19");
}

// Tensors without memory: whoever looks into one throws.
TEST(LinearPolicyLossOnCuda, TheDoorWaitsForNothing) {
  detail::CudaKernels kernels = without_rows();
  kernels.has_policy_loss = [](const PolicyBatch&, const PolicyObjective&, const Normalizer&) {
    return true;
  };
  kernels.policy_gradient_of_logits = [](const PolicyBatch&, const PolicyObjective&,
                                         const Normalizer&, const detail::LogitsOfTokens&) {};
  kernels.policy_loss = [](const PolicyBatch& batch, const PolicyObjective&, const Normalizer&,
                           detail::WantedGradients) -> std::optional<detail::ComputedLoss> {
    return detail::ComputedLoss{
        at::empty({}, batch.logps.options()), at::empty_like(batch.logps), {}, {}};
  };
  Inputs in = packed(Inputs(at::kFloat), at::kLong);
  for (at::Tensor* each : {&in.hidden, &in.weight, &in.bias, &in.targets, &in.batch.offsets}) {
    *each = each->to(at::kMeta);
  }
  for (const auto& each : PolicyBatch::arguments()) {
    at::Tensor& tensor = in.batch.*each.member;
    if (tensor.defined()) tensor = tensor.to(at::kMeta);
  }
  const OnCuda door(kernels);
  for (const PolicyObjective& objective : {presets::grpo(0.1), presets::gspo()}) {
    const at::Tensor hidden = in.hidden.detach().requires_grad_();
    const LinearPolicyOutput out =
        linear_policy_loss(hidden, {in.weight, in.bias}, in.targets, in.batch, objective);
    out.loss.backward();
    EXPECT_TRUE(hidden.grad().is_meta());
  }
}

// ---- preference losses --------------------------------------------------------------------------

Results evaluated(const Inputs& in, const PreferenceBatch& batch,
                  const PreferenceObjective& objective, const LinearOptions& options) {
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight), bias = leaf(in.bias);
  const PreferenceOutput out =
      linear_preference_loss(hidden, {weight, bias}, in.targets, batch, objective, {}, options);
  (out.loss * 3).backward();
  return {out.loss.detach(), out.metrics.sums, hidden.grad(), weight.grad(), bias.grad()};
}

TEST(LinearPreferenceLossOnCuda, IsThatOfTheCpuForEveryObjective) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    const PreferenceObjective objective = row.preset();
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (const bool flat : {false, true}) {
        const Inputs in = flat ? packed(Inputs(dtype), at::kLong) : Inputs(dtype);
        PreferenceBatch batch{.logps = {}, .response_mask = in.batch.response_mask};
        if (objective.reference) batch.ref_logps = in.batch.ref_logps;
        if (objective.loss.takes_labels()) batch.labels = at::tensor({1, 0, 0, 1});
        batch.offsets = in.batch.offsets;
        const LinearOptions options{.chunk_bytes = in.bytes(7)};
        expect_as_on_cpu([&] { return evaluated(in, batch, objective, options); }, 7,
                         tolerance_of_logits(dtype), std::string(row.name));
      }
    }
  }
}

// -beta (chosen - rejected)
struct Difference {
  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return pair.rejected.score - pair.chosen.score;
  }
};

TEST(LinearPreferenceLossOnCuda, RefusesWithTheSentenceOfTheCpu) {
  const Inputs in = packed(Inputs(at::kFloat), at::kLong);
  const PreferenceBatch good{.logps = {},
                             .ref_logps = in.batch.ref_logps,
                             .response_mask = in.batch.response_mask,
                             .offsets = in.batch.offsets};
  const auto said = [&](const PreferenceBatch& batch, const PreferenceObjective& objective,
                        const PairNormalizer& normalizer) {
    return message([&] {
      linear_preference_loss(in.hidden, {in.weight, in.bias}, in.targets, batch, objective,
                             normalizer);
    });
  };
  PreferenceObjective own = presets::dpo(), with_nll = presets::dpo();
  own.loss = on_any_device(Difference{});
  with_nll.nll.coefficient = 0.5;
  PreferenceBatch without = good, short_one = good;
  without.ref_logps.reset();
  short_one.offsets = at::tensor({0, 5, 10, 10, 19});
  const auto expect = [&](const PreferenceBatch& batch, const PreferenceObjective& objective,
                          const PairNormalizer& normalizer) {
    const std::string want = said(batch, objective, normalizer);
    EXPECT_EQ(want.substr(0, 24), "linear_preference_loss: ");
    const OnCuda door;
    EXPECT_EQ(said(batch, objective, normalizer), want);
  };
  expect(good, with_nll, {.pairs = 10});  // without tokens
  expect(without, presets::dpo(), {});
  expect(short_one, own, {});
  const OnCuda door;
  EXPECT_EQ(said(short_one, presets::dpo(), {}), "no error");
}

}  // namespace
}  // namespace tether
