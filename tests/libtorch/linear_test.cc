#include <ATen/ATen.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/linear_loss.h"
#include "libtorch/token_logps.h"
#include "rl/catalogue.h"

namespace tether {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kRows = 4, kColumns = 5, kHidden = 6, kVocabulary = 37;

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

struct Inputs {
  at::Tensor hidden, weight, bias, targets, mask, old_logps, ref_logps, rollout_logps, advantages;

  LinearHead head() const { return {weight, bias}; }
  PolicyBatch policy() const {
    return {.logps = {},
            .advantages = advantages,
            .response_mask = mask,
            .old_logps = old_logps,
            .ref_logps = ref_logps,
            .rollout_logps = rollout_logps};
  }
};

Inputs random_inputs(at::ScalarType type = at::kDouble, bool with_bias = true) {
  at::manual_seed(11);
  const auto normal = [&](at::IntArrayRef sizes, double scale = 1) {
    return (at::randn(sizes, at::kDouble) * scale).to(type);
  };
  Inputs in;
  in.hidden = normal({kRows, kColumns, kHidden}, 2);
  in.weight = normal({kVocabulary, kHidden});
  if (with_bias) in.bias = normal({kVocabulary});
  in.targets = at::randint(kVocabulary, {kRows, kColumns}, at::kLong);
  in.mask = at::rand({kRows, kColumns}) > 0.3;
  in.mask[2].zero_();
  in.mask[1].fill_(true);
  const at::Tensor logps = token_logps(at::linear(in.hidden, in.weight, in.bias), in.targets).logps;
  in.old_logps = logps + 0.3 * at::randn_like(logps);
  in.ref_logps = logps + 0.3 * at::randn_like(logps);
  in.rollout_logps = logps + 0.3 * at::randn_like(logps);
  in.advantages = at::randn_like(logps);
  return in;
}

std::vector<at::Tensor> gradients(const at::Tensor& of, const std::vector<at::Tensor>& in) {
  std::vector<at::Tensor> defined;
  for (const at::Tensor& each : in) {
    if (each.defined() && each.requires_grad()) defined.push_back(each);
  }
  return torch::autograd::grad({of}, defined);
}

void expect_close(const at::Tensor& got, const at::Tensor& want, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  const at::Tensor same = got == want;  // of extremes of nothing: infinity
  const at::Tensor a = got.to(at::kDouble).masked_fill(same, 0);
  const at::Tensor b = want.to(at::kDouble).masked_fill(same, 0);
  const double scale = std::max(1.0, want.masked_fill(want.isinf(), 0).abs().max().item<double>());
  EXPECT_LE((a - b).abs().max().item<double>(), tolerance * scale) << what;
}

// logps, entropies, and the gradients of sum(a logps + b entropies).
std::vector<at::Tensor> token_results(const Inputs& in, LinearOptions options, bool fused) {
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const at::Tensor bias = in.bias.defined() ? leaf(in.bias) : at::Tensor();
  options.entropies = true;
  TokenLogps out;
  if (fused) {
    out = linear_token_logps(hidden, {weight, bias}, in.targets, options);
  } else {
    out = token_logps(at::linear(hidden, weight, bias), in.targets,
                      {.row = options.row, .entropies = true});
  }
  const at::Tensor a = at::linspace(-0.5, 2, in.targets.numel(), at::kDouble).view_as(in.targets);
  const at::Tensor loss = (out.logps * a + out.entropies * (1.7 - a)).sum();
  std::vector<at::Tensor> results = {out.logps.detach(), out.entropies.detach()};
  for (const at::Tensor& each : gradients(loss, {hidden, weight, bias})) results.push_back(each);
  return results;
}

// ---- log-probabilities --------------------------------------------------------------------------

TEST(Linear, TokenLogpsAreThoseOfTheWholeLogits) {
  for (bool with_bias : {true, false}) {
    for (double softcap : {0.0, 8.0}) {
      for (int64_t rows_a_chunk : {1, 7, 20, 1000}) {
        Inputs in = random_inputs(at::kDouble, with_bias);
        in.targets[3][1] = -100;
        const LinearOptions options = {
            .row = {.temperature = 0.8, .scale = 1.3, .softcap = softcap},
            .chunk_bytes = rows_a_chunk * kVocabulary * 8};
        const auto got = token_results(in, options, true), want = token_results(in, options, false);
        ASSERT_EQ(got.size(), want.size());
        for (size_t i = 0; i < got.size(); ++i) {
          expect_close(got[i], want[i], 1e-13,
                       "result " + std::to_string(i) + ", rows " + std::to_string(rows_a_chunk));
        }
      }
    }
  }
}

TEST(Linear, TypesOfTheInputs) {
  for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    Inputs in = random_inputs(type), wide = in;
    for (at::Tensor* each : {&wide.hidden, &wide.weight, &wide.bias}) *each = each->to(at::kDouble);
    const auto want = token_results(wide, {}, false);
    for (int64_t chunk_bytes : {int64_t{3} * kVocabulary * 4, int64_t{1} << 20}) {
      const auto got = token_results(in, {.chunk_bytes = chunk_bytes}, true);
      EXPECT_EQ(got[0].scalar_type(), at::kFloat);
      EXPECT_EQ(got[3].scalar_type(), type);
      const double tolerance = type == at::kFloat ? 1e-5 : 0.05;  // logits are rounded to bfloat16
      for (size_t i = 0; i < got.size(); ++i) {
        expect_close(got[i], want[i], tolerance, c10::toString(type));
      }
    }
  }
}

// A matrix product rounds differently for different numbers of rows.
TEST(Linear, FixedChunksGiveATokenTheSameBitsInAnyBatch) {
  at::manual_seed(3);
  for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor hidden = at::randn({390, 1024}).to(type);
    const LinearHead head = {at::randn({640, 1024}).to(type) * 0.05, at::randn({640}).to(type)};
    const at::Tensor targets = at::randint(640, {390}, at::kLong);
    const LinearOptions options = {.entropies = true, .rows_per_chunk = 64};
    const TokenLogps whole = linear_token_logps(hidden, head, targets, options);
    for (const auto& [begin, end] : {std::pair{0, 1}, {0, 65}, {7, 31}, {100, 390}}) {
      const TokenLogps part = linear_token_logps(hidden.slice(0, begin, end), head,
                                                 targets.slice(0, begin, end), options);
      EXPECT_TRUE(at::equal(part.logps, whole.logps.slice(0, begin, end))) << begin << " " << end;
      EXPECT_TRUE(at::equal(part.entropies, whole.entropies.slice(0, begin, end)));
    }
    at::Tensor some = targets.clone();  // fewer, and at other places of their chunks
    some.slice(0, 0, 390, 3).fill_(-100);
    const at::Tensor transposed = hidden.t().contiguous().t();
    EXPECT_TRUE(
        at::equal(linear_token_logps(transposed, head, targets, options).logps, whole.logps));
    const TokenLogps left = linear_token_logps(hidden, head, some, options);
    EXPECT_TRUE(at::equal(left.logps, whole.logps.masked_fill(some == -100, 0)));
  }
}

TEST(Linear, FixedChunksAreTheSameLoss) {
  for (int64_t rows : {1, 7, 64}) {
    const Inputs in = random_inputs();
    const auto got = token_results(in, {.rows_per_chunk = rows}, true);
    const auto want = token_results(in, {}, false);
    for (size_t i = 0; i < got.size(); ++i) {
      expect_close(got[i], want[i], 1e-13, "result " + std::to_string(i));
    }
    expect_close(
        linear_policy_loss(in.hidden, in.head(), in.targets, in.policy(), presets::dapo(), {},
                           {.rows_per_chunk = rows})
            .loss,
        linear_policy_loss(in.hidden, in.head(), in.targets, in.policy(), presets::dapo()).loss,
        1e-13, "policy loss");
  }
}

TEST(Linear, FiniteDifferences) {
  Inputs in = random_inputs();
  const auto analytic = token_results(in, {.row = {.temperature = 0.7}}, true);
  const at::Tensor a = at::linspace(-0.5, 2, in.targets.numel(), at::kDouble).view_as(in.targets);
  const auto value = [&] {
    const TokenLogps out = linear_token_logps(in.hidden, in.head(), in.targets,
                                              {.row = {.temperature = 0.7}, .entropies = true});
    return (out.logps * a + out.entropies * (1.7 - a)).sum().item<double>();
  };
  at::Tensor* tensors[] = {&in.hidden, &in.weight, &in.bias};
  for (size_t k = 0; k < 3; ++k) {
    double* data = tensors[k]->data_ptr<double>();
    const at::Tensor gradient = analytic[k + 2].contiguous();
    for (int64_t i = 0; i < tensors[k]->numel(); i += 7) {
      const double at = data[i], step = 1e-5;
      data[i] = at + step;
      const double up = value();
      data[i] = at - step;
      const double down = value();
      data[i] = at;
      EXPECT_NEAR(gradient.data_ptr<double>()[i], (up - down) / (2 * step), 1e-8) << k << ", " << i;
    }
  }
}

TEST(Linear, StatisticsOnRequest) {
  Inputs in = random_inputs();
  in.targets[0][0] = -100;
  const TokenLogps got = linear_token_logps(in.hidden, in.head(), in.targets, {.statistics = true});
  const TokenLogps want =
      token_logps(at::linear(in.hidden, in.weight, in.bias), in.targets, {.statistics = true});
  expect_close(got.sum_of_squared_p, want.sum_of_squared_p, 1e-14, "sum p^2");
  expect_close(got.mean_logits, want.mean_logits, 1e-13, "mean logit");
  EXPECT_TRUE(at::equal(got.target_is_largest, want.target_is_largest));
}

TEST(Linear, FrozenInputsLeaveTheOthersAlone) {
  const Inputs in = random_inputs();
  const auto want = token_results(in, {}, true);
  for (int frozen = 0; frozen < 3; ++frozen) {
    at::Tensor inputs[] = {leaf(in.hidden), leaf(in.weight), leaf(in.bias)};
    inputs[frozen].requires_grad_(false);
    const TokenLogps out =
        linear_token_logps(inputs[0], {inputs[1], inputs[2]}, in.targets, {.entropies = true});
    const at::Tensor a = at::linspace(-0.5, 2, in.targets.numel(), at::kDouble).view_as(in.targets);
    (out.logps * a + out.entropies * (1.7 - a)).sum().backward();
    for (int i = 0; i < 3; ++i) {
      if (i == frozen) {
        EXPECT_FALSE(inputs[i].grad().defined());
      } else {
        EXPECT_TRUE(at::equal(inputs[i].grad(), want[static_cast<size_t>(i) + 2]));
      }
    }
  }
}

TEST(Linear, IgnoredPositionsMayHoldAnything) {
  Inputs in = random_inputs();
  in.targets[1][2] = in.targets[3][4] = -100;
  const auto want = token_results(in, {}, true);
  in.hidden[1][2].fill_(kNan);
  in.hidden[3][4].fill_(std::numeric_limits<double>::infinity());
  const auto got = token_results(in, {}, true);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
  in.targets.fill_(-100);
  for (const at::Tensor& each : token_results(in, {}, true)) {
    EXPECT_EQ(each.abs().max().item<double>(), 0);
  }
}

TEST(Linear, IgnoredPositionsMayHoldAnythingOnAnyDevice) {
  Inputs in = random_inputs();
  in.targets[1][2] = -100;
  const auto run = [&] {
    const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
    const TokenLogps out =
        detail::linear_token_logps_any_device(hidden, {weight, in.bias}, in.targets, {});
    std::vector<at::Tensor> results = gradients(out.logps.sum(), {hidden, weight});
    results.push_back(out.logps.detach());
    return results;
  };
  const auto want = run();
  in.hidden[1][2].fill_(kNan);
  const auto got = run();
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
}

TEST(Linear, GradientsAccumulate) {
  const Inputs in = random_inputs();
  at::Tensor weight = leaf(in.weight);
  linear_token_logps(in.hidden, {weight, in.bias}, in.targets).logps.sum().backward();
  const at::Tensor once = weight.grad().clone();
  linear_token_logps(in.hidden, {weight, in.bias}, in.targets).logps.sum().backward();
  expect_close(weight.grad(), 2 * once, 1e-15, "twice");
}

// The first backward uses the logits of a single chunk up.
TEST(Linear, BackwardTwiceIsTheSame) {
  const Inputs in = random_inputs();
  for (int64_t chunk_bytes : {int64_t{1} << 20, int64_t{3} * kVocabulary * 8}) {
    const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
    const TokenLogps out =
        linear_token_logps(hidden, {weight}, in.targets, {.chunk_bytes = chunk_bytes});
    const auto run = [&](const at::Tensor& factors) {
      return torch::autograd::grad({(out.logps * factors).sum()}, {hidden, weight}, {},
                                   /*retain_graph=*/true);
    };
    const at::Tensor factors = at::linspace(0.5, 2, 20, at::kDouble).view_as(in.targets);
    const auto first = run(factors), second = run(factors);
    const at::Tensor plain = token_logps(at::linear(hidden, weight), in.targets).logps;
    const auto want = torch::autograd::grad({(plain * factors).sum()}, {hidden, weight});
    for (size_t i = 0; i < 2; ++i) {
      expect_close(first[i], want[i], 1e-13, "first");
      expect_close(second[i], want[i], 1e-13, "second");
    }
  }
}

TEST(Linear, BackwardOfSomeTokensIsTheSame) {
  const Inputs in = random_inputs();
  at::Tensor factors = at::linspace(0.5, 2, 20, at::kDouble).view_as(in.targets);
  factors.masked_fill_(in.mask.logical_not(), 0);
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const auto run = [&](const at::Tensor& logps) {
    return torch::autograd::grad({(logps * factors).sum()}, {hidden, weight});
  };
  const auto got = run(linear_token_logps(hidden, {weight}, in.targets).logps);
  const auto want = run(token_logps(at::linear(hidden, weight), in.targets).logps);
  for (size_t i = 0; i < 2; ++i) expect_close(got[i], want[i], 1e-13, std::to_string(i));
}

TEST(Linear, SecondBackwardIsRefused) {
  const Inputs in = random_inputs();
  const at::Tensor hidden = leaf(in.hidden);
  const at::Tensor logps = linear_token_logps(hidden, in.head(), in.targets).logps;
  const at::Tensor first =
      torch::autograd::grad({logps.square().sum()}, {hidden}, {}, {}, /*create_graph=*/true)[0];
  EXPECT_THROW(first.square().sum().backward(), c10::NotImplementedError);
}

// ---- policy losses ------------------------------------------------------------------------------

struct PolicyResult {
  double loss;
  at::Tensor sums, maxima, logps;
  std::vector<at::Tensor> gradients;
};

PolicyResult policy_result(const Inputs& in, const PolicyBatch& batch,
                           const PolicyObjective& objective, const Normalizer& normalizer,
                           const LinearOptions& options, bool fused) {
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const at::Tensor bias = in.bias.defined() ? leaf(in.bias) : at::Tensor();
  LossOutput out;
  at::Tensor logps;
  if (fused) {
    const LinearPolicyOutput made = linear_policy_loss(hidden, {weight, bias}, in.targets, batch,
                                                       objective, normalizer, options);
    out = {made.loss, made.metrics};
    logps = made.logps;
  } else {
    const TokenLogps made = token_logps(at::linear(hidden, weight, bias), in.targets,
                                        {.row = options.row, .entropies = true});
    PolicyBatch whole = batch;
    whole.logps = made.logps;
    if (objective.entropy.coefficient != 0) whole.entropies = made.entropies;
    out = policy_loss(whole, objective, normalizer);
    logps = made.logps.detach().masked_fill(in.mask == 0, 0);
  }
  const double loss = out.loss.item<double>();
  return {loss, out.metrics.sums, out.metrics.maxima, logps,
          gradients(out.loss * 1.7, {hidden, weight, bias})};
}

void expect_same(const PolicyResult& got, const PolicyResult& want, double tolerance,
                 const std::string& what) {
  EXPECT_NEAR(got.loss, want.loss, tolerance * std::max(1.0, std::abs(want.loss))) << what;
  expect_close(got.sums, want.sums, tolerance, what + " metrics");
  expect_close(got.maxima, want.maxima, tolerance, what + " maxima");
  expect_close(got.logps, want.logps, tolerance, what + " logps");
  ASSERT_EQ(got.gradients.size(), want.gradients.size());
  for (size_t i = 0; i < got.gradients.size(); ++i) {
    expect_close(got.gradients[i], want.gradients[i], tolerance,
                 what + " gradient " + std::to_string(i));
  }
}

TEST(Linear, PolicyLossOfEveryPresetIsThatOfTheWholeLogits) {
  const Inputs in = random_inputs();
  for (const auto& row : kCatalogue) {
    PolicyObjective objective = preset("test", row.name);
    objective.entropy.coefficient = 0.01;
    for (int64_t rows_a_chunk : {1, 3, 7, 1000}) {
      const LinearOptions options = {.row = {.temperature = 0.9},
                                     .chunk_bytes = rows_a_chunk * kVocabulary * 8};
      for (const Normalizer& normalizer :
           {Normalizer{}, Normalizer{.policy = 40, .sequences = 9, .world_size = 2}}) {
        expect_same(policy_result(in, in.policy(), objective, normalizer, options, true),
                    policy_result(in, in.policy(), objective, normalizer, options, false), 1e-12,
                    std::string(row.name) + ", rows " + std::to_string(rows_a_chunk));
      }
    }
  }
}

TEST(Linear, PolicyLossOfEveryAggregation) {
  Inputs in = random_inputs();
  in.mask = at::rand({kRows, kColumns}, at::kDouble) * in.mask.to(at::kDouble);  // weights
  for (size_t mode = 0; mode < kAggregationNames.size(); ++mode) {
    PolicyObjective objective = presets::grpo(0.04);
    objective.aggregation = {Aggregation::Mode(mode), 5};
    const LinearOptions options = {.chunk_bytes = 3 * kVocabulary * 8};
    expect_same(policy_result(in, in.policy(), objective, {}, options, true),
                policy_result(in, in.policy(), objective, {}, options, false), 1e-12,
                std::string(kAggregationNames[mode]));
  }
}

TEST(Linear, PolicyLossWithWeightsOfEveryLevel) {
  const Inputs in = random_inputs();
  PolicyBatch batch = in.policy();
  batch.rollout_logps = batch.old_logps + 0.3 * at::randn_like(batch.old_logps);
  batch.turn_ids = at::arange(kColumns, at::kLong).div(3, "floor").expand({kRows, kColumns});
  LinearOptions options;
  options.chunk_bytes = 3 * kVocabulary * 8;
  for_each_weight([&](const auto& row) {
    for (const WeightLevel level :
         {WeightLevel::token, WeightLevel::sequence_mean, WeightLevel::turn_mean}) {
      PolicyObjective objective = presets::dapo();
      objective.kl.beta = 0.1;
      objective.weights = {{row.defaults, level}, {TruncatedImportance{.high = 1.2}}};
      expect_same(policy_result(in, batch, objective, {}, options, true),
                  policy_result(in, batch, objective, {}, options, false), 1e-12,
                  std::string(row.name));
    }
  });
}

TEST(Linear, PackedPolicyLossIsThePaddedOne) {
  Inputs in = random_inputs();
  const PolicyObjective objective = presets::grpo(0.04);
  const LinearOptions options = {.chunk_bytes = 3 * kVocabulary * 8};
  const PolicyResult want = policy_result(in, in.policy(), objective, {}, options, true);
  Inputs packed = in;
  packed.hidden = in.hidden.reshape({-1, kHidden});
  for (at::Tensor* each : {&packed.targets, &packed.mask, &packed.old_logps, &packed.ref_logps,
                           &packed.rollout_logps, &packed.advantages}) {
    *each = each->reshape({-1});
  }
  PolicyBatch batch = packed.policy();
  batch.offsets = at::arange(0, (kRows + 1) * kColumns, kColumns, at::kInt);
  PolicyResult got = policy_result(packed, batch, objective, {}, options, true);
  got.logps = got.logps.view({kRows, kColumns});
  got.gradients[0] = got.gradients[0].view_as(in.hidden);
  expect_same(got, want, 1e-14, "packed");
}

TEST(Linear, MaskedPositionsMayHoldAnything) {
  for (const char* name : {"grpo", "gspo"}) {
    Inputs in = random_inputs();
    const PolicyObjective objective = preset("test", name);
    const PolicyResult want = policy_result(in, in.policy(), objective, {}, {}, true);
    const at::Tensor masked = in.mask.logical_not();
    in.hidden.masked_fill_(masked.unsqueeze(-1), kNan);
    in.targets.masked_fill_(masked, int64_t{1} << 40);
    in.old_logps.masked_fill_(masked, kNan);
    in.advantages.masked_fill_(masked, kNan);
    in.ref_logps.masked_fill_(masked, kNan);
    PolicyResult got = policy_result(in, in.policy(), objective, {}, {}, true);
    expect_same(got, want, 0, name);
    in.mask.fill_(false);
    got = policy_result(in, in.policy(), objective, {}, {}, true);
    EXPECT_EQ(got.loss, 0);
    for (const at::Tensor& gradient : got.gradients) {
      EXPECT_EQ(gradient.abs().max().item<double>(), 0);
    }
  }
}

TEST(Linear, PolicyLossOfFrozenInputs) {
  const Inputs in = random_inputs();
  const PolicyObjective objective = presets::grpo(0.04);
  const at::Tensor hidden = leaf(in.hidden);
  const PolicyResult all = policy_result(in, in.policy(), objective, {}, {}, true);
  const LinearPolicyOutput out =
      linear_policy_loss(hidden, in.head(), in.targets, in.policy(), objective);
  EXPECT_TRUE(at::equal(torch::autograd::grad({out.loss * 1.7}, {hidden})[0], all.gradients[0]));
  EXPECT_FALSE(out.logps.requires_grad());
  const LinearPolicyOutput constant =
      linear_policy_loss(in.hidden, in.head(), in.targets, in.policy(), objective);
  EXPECT_FALSE(constant.loss.requires_grad());
  EXPECT_EQ(constant.loss.item<double>(), all.loss);
}

// ---- preference losses --------------------------------------------------------------------------

TEST(Linear, PreferenceLossIsThatOfTheWholeLogits) {
  Inputs in = random_inputs();
  in.mask[2].fill_(true);
  const at::Tensor masked = in.mask.logical_not();
  for (const auto& row : kPreferenceCatalogue) {
    const PreferenceObjective objective = preference_preset("test", row.name);
    std::vector<at::Tensor> results[2];
    for (bool fused : {false, true}) {
      const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight), bias = leaf(in.bias);
      PreferenceBatch batch{.logps = {}, .ref_logps = in.ref_logps, .response_mask = in.mask};
      if (objective.loss.takes_labels()) batch.labels = at::arange(in.mask.size(0)).remainder(2);
      PreferenceOutput out;
      if (fused) {
        out = linear_preference_loss(hidden, {weight, bias},
                                     in.targets.masked_fill(masked, int64_t{1} << 40), batch,
                                     objective, {}, {.chunk_bytes = 3 * kVocabulary * 8});
      } else {
        batch.logps = token_logps(at::linear(hidden, weight, bias), in.targets).logps;
        out = preference_loss(batch, objective);
      }
      results[fused] = gradients(out.loss * 1.7, {hidden, weight, bias});
      results[fused].push_back(out.loss.detach());
    }
    for (size_t i = 0; i < 4; ++i) {
      expect_close(results[1][i], results[0][i], 1e-13, std::string(row.name));
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------

// The most bytes that the thread's allocations held at once.
class PeakMemory : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    held_ += size;
    peak_ = std::max(peak_, held_);
  }
  bool memoryProfilingEnabled() const override { return true; }

  template <class Body>
  static int64_t of(Body body) {
    const auto meter = std::make_shared<PeakMemory>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
    body();
    return meter->peak_;
  }

 private:
  int64_t held_ = 0, peak_ = 0;
};

TEST(Linear, PeakMemoryDoesNotGrowWithTheLogits) {
  constexpr int64_t kTokens = 512, kWide = 16, kIds = 20000, kChunk = int64_t{4} << 20;
  const at::Tensor weight = leaf(at::randn({kIds, kWide}));
  const at::Tensor targets = at::randint(kIds, {8, kTokens / 8}, at::kLong);
  const at::Tensor hidden = leaf(at::randn({8, kTokens / 8, kWide}));
  const PolicyBatch batch{.logps = {},
                          .advantages = at::randn({8, kTokens / 8}),
                          .response_mask = at::ones({8, kTokens / 8}, at::kBool)};
  const int64_t logits = kTokens * kIds * 4;
  // The gradients of weight and hidden, the chunk, what the rows and tokens need.
  const int64_t limit = (kIds + kTokens) * kWide * 4 + kChunk + kTokens * 256 + (64 << 10);
  ASSERT_LT(4 * limit, logits);
  const auto policy = [&](const char* name) {
    return [&, name] {
      linear_policy_loss(hidden, {weight}, targets, batch, preset("test", name), {},
                         {.chunk_bytes = kChunk})
          .loss.backward();
    };
  };
  const auto run = [&](auto body) {
    weight.mutable_grad() = hidden.mutable_grad() = at::Tensor();
    return PeakMemory::of(body);
  };
  EXPECT_LE(run(policy("ppo")), limit);
  EXPECT_LE(run(policy("gspo")), limit);
  EXPECT_LE(run([&] {
              linear_token_logps(hidden, {weight}, targets, {.chunk_bytes = kChunk})
                  .logps.sum()
                  .backward();
            }),
            limit);
  // The meter sees what it should: the whole logits.
  EXPECT_GE(run([&] { token_logps(at::linear(hidden, weight), targets).logps.sum().backward(); }),
            2 * logits);
}

// ---- errors -------------------------------------------------------------------------------------

template <class Exception, class Body>
std::string message(Body body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(Linear, BadInputIsRefused) {
  const Inputs good = random_inputs();
  const auto refusal = [&]<class Exception>(auto change, Exception*) {
    Inputs in = good;
    LinearOptions options;
    change(in, options);
    return message<Exception>(
        [&] { linear_token_logps(in.hidden, in.head(), in.targets, options); });
  };
  const auto value = static_cast<c10::ValueError*>(nullptr);
  const auto type = static_cast<c10::TypeError*>(nullptr);
  const auto index = static_cast<c10::IndexError*>(nullptr);
  const std::string name = "linear_token_logps: ";
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.hidden = at::Tensor(); }, value),
            name + "hidden must be given, got none");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.hidden = in.hidden.to(at::kLong); }, type),
            name + "hidden must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.weight = at::Tensor(); }, value),
            name + "weight must be given, got none");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.weight = in.weight.t(); }, value),
            name + "weight must be [V, 6] with V at least 1, for hidden [4, 5, 6], got [6, 37]");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.weight = in.weight.to(at::kLong); }, type),
            name + "weight must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.bias = in.bias.slice(0, 1); }, value),
            name + "bias must be [37] like the rows of weight, got [36]");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.targets = in.targets.slice(1, 1); }, value),
            name + "targets must be [4, 5] like hidden [4, 5, 6], got [4, 4]");
  EXPECT_EQ(refusal([](Inputs& in, auto&) { in.targets = in.targets.clone().fill_(37); }, index),
            name + "targets must be in [0, 37) or ignore_index -100, got 37 at [0, 0]");
  EXPECT_EQ(refusal([](Inputs&, LinearOptions& options) { options.chunk_bytes = 0; }, value),
            name + "chunk_bytes must be at least 1, got 0");
  EXPECT_EQ(refusal([](Inputs&, LinearOptions& options) { options.row.softcap = -1; }, value),
            name + "softcap must be in [0, 1e+06], got -1");
}

TEST(Linear, RowsPerChunkIsChecked) {
  const Inputs in = random_inputs();
  for (const int64_t rows : {int64_t{-1}, int64_t{1000000000000}}) {
    try {
      linear_token_logps(in.hidden, in.head(), in.targets, {.rows_per_chunk = rows});
      ADD_FAILURE() << "no error";
    } catch (const c10::ValueError& error) {
      EXPECT_EQ(std::string(error.what_without_backtrace()),
                "linear_token_logps: rows_per_chunk must be in [0, 2147483647], got " +
                    std::to_string(rows));
    }
  }
  const int64_t largest = std::numeric_limits<int64_t>::max();
  EXPECT_TRUE(at::equal(
      linear_token_logps(in.hidden, in.head(), in.targets, {.chunk_bytes = largest}).logps,
      linear_token_logps(in.hidden, in.head(), in.targets).logps));
}

TEST(Linear, BadLossesAreRefused) {
  const Inputs in = random_inputs();
  const auto refusal = [&](PolicyBatch batch, const PolicyObjective& objective = presets::ppo()) {
    return message<c10::ValueError>(
        [&] { linear_policy_loss(in.hidden, in.head(), in.targets, batch, objective); });
  };
  PolicyBatch batch = in.policy();
  batch.logps = in.old_logps;
  EXPECT_EQ(refusal(batch),
            "linear_policy_loss: logps must be absent, got a tensor. It is made here");
  batch = in.policy();
  batch.response_mask = at::Tensor();
  EXPECT_EQ(refusal(batch), "linear_policy_loss: response_mask must be given, got none");
  batch = in.policy();
  batch.advantages = at::zeros({3}, at::kDouble);
  EXPECT_EQ(refusal(batch), "linear_policy_loss: advantages must be [4] or [4, 5], got [3]");
  batch = in.policy();
  batch.ref_logps = at::Tensor();
  EXPECT_EQ(refusal(batch, presets::grpo(0.1)),
            "linear_policy_loss: ref_logps must be given when beta is greater than 0, got beta 0.1 "
            "and none. Pass ref_logps or beta = 0");
  EXPECT_EQ(message<c10::ValueError>([&] {
              linear_preference_loss(in.hidden, in.head(), in.targets, {.logps = {}},
                                     presets::dpo());
            }),
            "linear_preference_loss: response_mask must be given, got none");
}

// On the way to the loss other doors are passed.
TEST(Linear, ErrorsOfLossesBearTheirNames) {
  const Inputs good = random_inputs();
  const auto first_word = [&](const PolicyObjective& objective, auto change) {
    Inputs in = good;
    Normalizer normalizer;
    LinearOptions options;
    change(in, normalizer, options);
    const auto policy = [&] {
      linear_policy_loss(in.hidden, in.head(), in.targets, in.policy(), objective, normalizer,
                         options);
    };
    const std::string said = message<c10::Error>(policy);
    return said.substr(0, said.find(" must"));
  };
  const std::string name = "linear_policy_loss: ";
  for (const PolicyObjective& objective : {presets::ppo(), presets::gspo()}) {
    const auto named = [&](auto change) { return first_word(objective, change); };
    EXPECT_EQ(named([](Inputs& in, auto&, auto&) { in.hidden = at::Tensor(); }), name + "hidden");
    EXPECT_EQ(named([](Inputs& in, auto&, auto&) { in.targets = at::Tensor(); }), name + "targets");
    EXPECT_EQ(named([](Inputs& in, auto&, auto&) { in.targets = in.targets + kVocabulary; }),
              name + "targets");
    EXPECT_EQ(named([](Inputs& in, auto&, auto&) { in.old_logps = in.old_logps.slice(0, 1); }),
              name + "old_logps");
    EXPECT_EQ(named([](Inputs& in, auto&, auto&) { in.mask = in.mask.to(at::kFloat) * 2; }),
              name + "response_mask");
    EXPECT_EQ(named([](Inputs&, Normalizer& by, auto&) { by.world_size = 0; }),
              name + "normalizer.world_size");
    EXPECT_EQ(named([](Inputs&, auto&, LinearOptions& options) { options.row.scale = 0; }),
              name + "scale");
  }
}

TEST(Linear, ErrorsOfPreferenceLossesBearItsName) {
  const Inputs in = random_inputs();
  const PreferenceBatch good{
      .logps = {}, .ref_logps = in.ref_logps, .response_mask = at::ones_like(in.mask)};
  const auto refusal = [&](const at::Tensor& targets, const PreferenceBatch& batch,
                           const LinearOptions& options = {}) {
    return message<c10::Error>([&] {
      linear_preference_loss(in.hidden, in.head(), targets, batch, presets::dpo(), {}, options);
    });
  };
  const std::string name = "linear_preference_loss: ";
  EXPECT_EQ(refusal(in.targets, good), "no error");
  PreferenceBatch bad = good;
  bad.logps = in.old_logps;
  EXPECT_EQ(refusal(in.targets, bad), name + "logps must be absent, got a tensor. It is made here");
  bad = good;
  bad.ref_logps = in.ref_logps.slice(0, 1);
  EXPECT_EQ(refusal(in.targets, bad), name + "ref_logps must be [4, 5] like logps, got [3, 5]");
  bad = good;
  bad.ref_logps = at::Tensor();
  EXPECT_EQ(refusal(in.targets, bad).substr(0, name.size() + 23), name + "ref_logps must be given");
  EXPECT_EQ(refusal(at::Tensor(), good), name + "targets must be given, got none");
  EXPECT_EQ(refusal(at::full_like(in.targets, 37), good),
            name + "targets must be in [0, 37) or ignore_index -100, got 37 at [0, 0]");
  EXPECT_EQ(refusal(in.targets, good, {.chunk_bytes = 0}),
            name + "chunk_bytes must be at least 1, got 0");
}

TEST(Linear, PreferenceLossOfAnswersOfOneToken) {
  const Inputs in = random_inputs();
  const at::Tensor hidden = in.hidden.select(1, 0), targets = in.targets.select(1, 0);
  const at::Tensor ref_logps = in.ref_logps.select(1, 0), mask = at::ones({kRows});
  const auto loss = [&](auto shaped) {
    return linear_preference_loss(
               shaped(hidden), in.head(), shaped(targets),
               {.logps = {}, .ref_logps = shaped(ref_logps), .response_mask = shaped(mask)},
               presets::dpo())
        .loss.template item<double>();
  };
  EXPECT_EQ(loss([](const at::Tensor& tensor) { return tensor; }),
            loss([](const at::Tensor& tensor) { return tensor.unsqueeze(1); }));
}

}  // namespace
}  // namespace tether
