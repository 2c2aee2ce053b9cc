// Preference and value losses on the way of CUDA tensors.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>

#include "libtorch/preference_loss.h"
#include "libtorch/value_loss.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Loss, metrics and the gradient, of an upstream one that is not 1.
Results evaluated(ValueBatch batch, const ValueObjective& objective,
                  const Normalizer& normalizer = {}) {
  batch.values = batch.values.detach().clone().requires_grad_();
  const ValueOutput out = value_loss(batch, objective, normalizer);
  (out.loss * 3).backward();
  return {out.loss.detach(), out.metrics.sums, batch.values.grad()};
}
Results evaluated(PreferenceBatch batch, const PreferenceObjective& objective,
                  const PairNormalizer& normalizer = {}) {
  batch.logps = batch.logps.detach().clone().requires_grad_();
  const PreferenceOutput out = preference_loss(batch, objective, normalizer);
  (out.loss * 3).backward();
  return {out.loss.detach(), out.metrics.sums, batch.logps.grad()};
}

// One row without tokens, NaN under the mask.
ValueBatch values_of(at::ScalarType dtype) {
  torch::manual_seed(6);
  const at::Tensor values = torch::randn({4, 9});
  ValueBatch batch{.values = values.to(dtype),
                   .returns = torch::randn({4, 9}),
                   .response_mask = torch::rand({4, 9}) > 0.3,
                   .old_values = (values + 0.4 * torch::randn({4, 9})).to(dtype)};
  batch.response_mask[2] = false;
  batch.values = batch.values.masked_fill(batch.response_mask.logical_not(), kNaN);
  return batch;
}

// A pair of padding. Scores, baselines and weights are unlike for the two answers.
PreferenceBatch answers_of(at::ScalarType dtype, const PreferenceObjective& objective) {
  torch::manual_seed(7);
  PreferenceBatch batch{.logps = -torch::randn({6, 9}).abs().to(dtype),
                        .ref_logps = -torch::randn({6, 9}).abs().to(dtype),
                        .response_mask = torch::rand({6, 9}) > 0.3,
                        .baselines = 0.1 * torch::randn({6}),
                        .answer_weights = torch::rand({6})};
  batch.response_mask[1] = false;
  batch.response_mask[4] = false;
  batch.logps = batch.logps.masked_fill(batch.response_mask.logical_not(), kNaN);
  if (!objective.reference) batch.ref_logps.reset();
  if (objective.loss.takes_labels()) batch.labels = at::tensor({1, 0, 1, 1, 0, 0});
  return batch;
}

// [N]; `ends` of the rows.
template <template <class> class Inputs>
Inputs<at::Tensor> packed(Inputs<at::Tensor> batch, std::vector<int64_t> offsets,
                          at::ScalarType index) {
  for (const auto& each : Inputs<at::Tensor>::arguments()) {
    at::Tensor& tensor = batch.*each.member;
    if (tensor.defined() && tensor.dim() == 2) tensor = tensor.flatten();
  }
  batch.offsets = at::tensor(offsets, at::dtype(index));
  return batch;
}

const std::vector<int64_t> kOfValues{0, 5, 5, 20, 36}, kOfAnswers{0, 9, 18, 27, 36, 45, 54};

TEST(ValueLossOnCuda, IsThatOfTheCpuForEveryObjective) {
  for (const ValueRow& row : kValueCatalogue) {
    ValueObjective objective = row.preset();
    for (const Aggregation& aggregation :
         {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
          sequence_sum_over_constant(30), token_sum()}) {
      objective.aggregation = aggregation;
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
        const ValueBatch batch = values_of(dtype);
        expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, tolerance_of(dtype),
                         std::string(row.name));
      }
      for (const at::ScalarType index : {at::kInt, at::kLong}) {
        const ValueBatch batch = packed(values_of(at::kFloat), kOfValues, index);
        expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, 2e-5,
                         std::string(row.name) + ", packed");
      }
    }
  }
}

TEST(PreferenceLossOnCuda, IsThatOfTheCpuForEveryObjective) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    PreferenceObjective objective = row.preset();
    for (const double nll : {0.0, 0.4}) {
      if (nll > 0) objective.nll.coefficient = nll;
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
        const PreferenceBatch batch = answers_of(dtype, objective);
        expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, tolerance_of(dtype),
                         std::string(row.name));
      }
      for (const at::ScalarType index : {at::kInt, at::kLong}) {
        const auto batch = packed(answers_of(at::kFloat, objective), kOfAnswers, index);
        expect_as_on_cpu([&] { return evaluated(batch, objective); }, 1, 2e-5,
                         std::string(row.name) + ", packed");
      }
    }
  }
}

TEST(PreferenceLossOnCuda, IsThatOfTheCpuForWholeAnswers) {
  const at::Tensor logps = -torch::randn({6}).abs();
  const PreferenceBatch batch{.logps = logps, .ref_logps = logps - 0.2};
  expect_as_on_cpu([&] { return evaluated(batch, presets::dpo()); }, 1, 2e-5, "whole answers");
}

TEST(LossesOnCuda, TakeTheDenominatorsOfTheStep) {
  const ValueBatch values = values_of(at::kFloat);
  ValueObjective by_rows;
  by_rows.aggregation = sequence_mean_token_sum();
  for (const Normalizer& step : {Normalizer{.policy = 50, .world_size = 4, .scale = 0.5},
                                 Normalizer{.policy = 50, .sequences = 7}}) {
    const bool rows = step.sequences.has_value();
    expect_as_on_cpu([&] { return evaluated(values, rows ? by_rows : ValueObjective{}, step); }, 1,
                     2e-5, "values");
  }
  PreferenceObjective objective = presets::dpo();
  objective.nll.coefficient = 0.5;
  const PreferenceBatch answers = answers_of(at::kFloat, objective);
  for (const PairNormalizer& step :
       {PairNormalizer{.world_size = 4, .scale = 0.5}, PairNormalizer{.pairs = 10, .tokens = 90}}) {
    expect_as_on_cpu([&] { return evaluated(answers, objective, step); }, 1, 2e-5, "answers");
  }
}

// By kernels of the CPU, by those for CUDA, and by torch's operations.
TEST(LossesOnCuda, RefuseDenominatorsThatAreNone) {
  const ValueBatch values = values_of(at::kFloat);
  const PreferenceBatch answers = answers_of(at::kFloat, presets::dpo());
  const auto expect_refused = [](auto call, auto by_torch) {
    const std::string want = message(call);
    EXPECT_NE(want, "no error");
    EXPECT_EQ(message(by_torch), want);
    const OnCuda door;
    EXPECT_EQ(message(call), want);
  };
  for (const PairNormalizer& step :
       {PairNormalizer{.pairs = -1}, PairNormalizer{.pairs = kNaN}, PairNormalizer{.pairs = 1e-300},
        PairNormalizer{.pairs = 1, .tokens = -1}, PairNormalizer{.world_size = 0},
        PairNormalizer{.scale = -1}}) {
    expect_refused([&] { preference_loss(answers, presets::dpo(), step); },
                   [&] { detail::preference_loss_any_device(answers, presets::dpo(), step); });
  }
  for (const Normalizer& step :
       {Normalizer{.policy = -1}, Normalizer{.policy = kNaN}, Normalizer{.policy = 1e-300},
        Normalizer{.world_size = 0}, Normalizer{.scale = -1}}) {
    expect_refused([&] { value_loss(values, {}, step); },
                   [&] { detail::value_loss_any_device(values, {}, step); });
  }
}

// (V - R)^4, a formula of a user's own.
struct Fourth {
  template <class Number>
  TETHER_FORMULA Number operator()(const ValueToken<Number>& token) const {
    const Number error = token.value - token.target;
    return error * error * error * error;
  }
};
// -beta (chosen - rejected)
struct Linear {
  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return pair.rejected.score - pair.chosen.score;
  }
};

template <class Output>
void expect_by_torch(const Output& got, const Output& want, const OnCuda& door) {
  EXPECT_EQ(door.taken(), 0);
  EXPECT_TRUE(at::equal(got.loss, want.loss));
  EXPECT_TRUE(at::equal(got.metrics.sums, want.metrics.sums));
}

TEST(LossesOnCuda, TakeTorchWhereThereIsNoKernel) {
  const ValueObjective own{.loss = on_any_device(Fourth{})};
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const ValueObjective objective = dtype == at::kFloat ? own : ValueObjective{};
    const ValueBatch batch = packed(values_of(dtype), kOfValues, at::kLong);
    const ValueOutput want = detail::value_loss_any_device(batch, objective);
    const OnCuda door;
    expect_by_torch(value_loss(batch, objective), want, door);
  }
  PreferenceObjective of_pairs = presets::dpo();
  of_pairs.loss = on_any_device(Linear{});
  PreferenceObjective with_nll = presets::dpo();
  with_nll.nll.coefficient = 0.5;
  const auto expect = [&](const PreferenceBatch& batch, const PreferenceObjective& objective,
                          const PairNormalizer& step) {
    const PreferenceOutput want = detail::preference_loss_any_device(batch, objective, step);
    const OnCuda door;
    expect_by_torch(preference_loss(batch, objective, step), want, door);
  };
  const PreferenceBatch batch = packed(answers_of(at::kFloat, of_pairs), kOfAnswers, at::kInt);
  expect(batch, of_pairs, {});
  expect(batch, with_nll, {.tokens = 9});
  expect(answers_of(at::kDouble, of_pairs), presets::dpo(), {});
  PreferenceBatch wide = batch;
  wide.logps = batch.logps.to(at::kDouble);
  expect(wide, presets::dpo(), {});
}

TEST(LocalCountsOnCuda, OfPairsAreThoseOfTheCpu) {
  PreferenceBatch with_nll = answers_of(at::kFloat, presets::dpo());
  with_nll.nll_mask = torch::rand({6, 9}) > 0.5;
  for (const PreferenceBatch& padded : {answers_of(at::kBFloat16, presets::dpo()),
                                        answers_of(at::kFloat, presets::kto()), with_nll}) {
    for (const PreferenceBatch& batch : {padded, packed(padded, kOfAnswers, at::kInt)}) {
      const auto counts = [&]() -> Results {
        const PairNormalizer found = local_counts(batch);
        return {at::tensor({*found.pairs, *found.tokens}, at::kDouble)};
      };
      expect_as_on_cpu(counts, 1, 0, "counts");
    }
  }
  PreferenceBatch wide = with_nll;
  wide.logps = with_nll.logps.to(at::kDouble);
  expect_as_on_cpu([&]() -> Results { return {at::tensor(*local_counts(wide).tokens)}; }, 0, 0,
                   "float64");
  PreferenceBatch odd = with_nll;
  for (at::Tensor* each : {&odd.logps, &odd.ref_logps, &odd.response_mask, &odd.nll_mask}) {
    *each = each->narrow(0, 0, 5);
  }
  for (at::Tensor* each : {&odd.baselines, &odd.answer_weights}) each->reset();
  const std::string want = message([&] { local_counts(odd); });
  EXPECT_EQ(want,
            "local_counts: logps must have an even number of rows, chosen answers before rejected "
            "ones, got 5");
  const OnCuda door;
  EXPECT_EQ(message([&] { local_counts(odd); }), want);
}

TEST(LossesOnCuda, LookAtOffsetsWhereTorchDoes) {
  const ValueBatch values = packed(values_of(at::kFloat), {0, 5, 5, 20, 20}, at::kLong);
  const PreferenceBatch answers =
      packed(answers_of(at::kFloat, presets::dpo()), {0, 9, 18, 27, 36, 45, 50}, at::kLong);
  const OnCuda door;
  EXPECT_EQ(message([&] { value_loss(values); }), "no error");
  EXPECT_EQ(message([&] { preference_loss(answers, presets::dpo()); }), "no error");
  EXPECT_EQ(door.taken(), 2);
  EXPECT_EQ(message([&] { value_loss(values, {.loss = on_any_device(Fourth{})}); }),
            "value_loss: offsets must run from 0 to 36, the size of values, got 0 to 20");
  PreferenceObjective own = presets::dpo();
  own.loss = on_any_device(Linear{});
  EXPECT_EQ(message([&] { preference_loss(answers, own); }),
            "preference_loss: offsets must run from 0 to 54, the size of logps, got 0 to 50");
}

}  // namespace
}  // namespace tether
