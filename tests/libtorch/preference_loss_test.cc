#include "libtorch/preference_loss.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <string>

#include "libtorch/arrays.h"
#include "tests/libtorch/message.h"
#include "tests/rl/links.h"

namespace tether {
namespace {

PreferenceBatch random_batch(int64_t pairs, int64_t columns, at::ScalarType dtype = at::kDouble) {
  torch::manual_seed(3);
  const auto options = at::dtype(dtype);
  const at::Tensor mask = torch::rand({2 * pairs, columns}) > 0.25;
  const at::Tensor logps = -torch::rand({2 * pairs, columns}, options) - 0.1;
  const at::Tensor poison = mask.logical_not();
  return {.logps = logps.masked_fill(poison, NAN).requires_grad_(),
          .ref_logps =
              (logps + 0.3 * torch::randn({2 * pairs, columns}, options)).masked_fill(poison, NAN),
          .response_mask = mask};
}

// The batch as the objective takes it.
PreferenceBatch labelled(PreferenceBatch batch, const PreferenceObjective& objective) {
  if (!objective.loss.takes_labels()) return batch;
  batch.labels = at::arange(face::count_rows(batch), at::kInt).remainder(2);
  return batch;
}

at::Tensor gradient(const at::Tensor& loss, const at::Tensor& logps) {
  return torch::autograd::grad({loss}, {logps}, {}, /*retain_graph=*/true)[0];
}

TEST(PreferenceLossFace, EqualsThePlainExpressionInValueAndGradient) {
  const PreferenceBatch batch = random_batch(6, 21);
  const at::Tensor logps = batch.logps.detach().clone().requires_grad_();
  const at::Tensor gaps = at::where(batch.response_mask, logps - batch.ref_logps, 0.0).sum(1);
  const at::Tensor margin = 0.2 * (gaps.narrow(0, 0, 6) - gaps.narrow(0, 6, 6));
  const at::Tensor plain = -at::log_sigmoid(margin).mean();
  const PreferenceOutput out = dpo_loss(batch, 0.2);
  EXPECT_NEAR(out.loss.item<double>(), plain.item<double>(), 1e-14);
  EXPECT_TRUE(at::allclose(gradient(2 * out.loss, batch.logps),
                           2 * gradient(plain, logps).nan_to_num(), 1e-12, 1e-16));
}

TEST(PreferenceLossFace, EveryDeviceRefusesDenominatorsThatAreNone) {
  const PreferenceBatch batch = random_batch(2, 3);
  const PreferenceObjective dpo = presets::dpo();
  for (const double count : {-1.0, double{NAN}, 1e-300}) {
    const PairNormalizer step{.pairs = count};
    const std::string got = message([&] { detail::preference_loss_any_device(batch, dpo, step); });
    EXPECT_EQ(got.rfind("preference_loss: normalizer.pairs must be", 0), 0) << got;
    EXPECT_EQ(message([&] { preference_loss(batch, dpo, step); }), got);
  }
}

TEST(PreferenceLossFace, ALossBeyondFloatIsItsLargestNumber) {
  const at::Tensor logps = at::tensor({1e30f, -1e30f}).reshape({2, 1}).requires_grad_();
  const PreferenceBatch batch{.logps = logps, .response_mask = at::ones({2, 1})};
  PreferenceObjective objective = presets::ipo();
  objective.reference = false;
  EXPECT_EQ(preference_loss(batch, objective).loss.item<float>(),
            std::numeric_limits<float>::max());
}

struct Doubled {
  template <class Number>
  Number operator()(const Number& score) const {
    return 2 * score;
  }
};

TEST(PreferenceLossFace, ALinkMayBeOnesOwn) {
  const PreferenceBatch batch = random_batch(4, 13);
  const PreferenceOutput expected = preference_loss(batch, presets::dpo(0.2));
  PreferenceObjective objective = presets::dpo(0.1);
  objective.link = Doubled{};
  const PreferenceOutput kernel = preference_loss(batch, objective);
  EXPECT_DOUBLE_EQ(kernel.loss.item<double>(), expected.loss.item<double>());
  const at::Tensor slope = gradient(expected.loss, batch.logps);
  EXPECT_TRUE(at::allclose(gradient(kernel.loss, batch.logps), slope, 1e-12, 1e-16));
  try {
    detail::preference_loss_any_device(batch, objective);
    FAIL();
  } catch (const c10::ValueError& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "preference_loss: link must be one of the library's or wrapped by on_any_device "
                 "on devices other than the CPU, got another type");
  }
  objective.link = on_any_device(Doubled{});
  const PreferenceOutput tensors = detail::preference_loss_any_device(batch, objective);
  EXPECT_TRUE(at::allclose(gradient(tensors.loss, batch.logps), slope, 1e-12, 1e-16));
}

void expect_same_on_every_device(const PreferenceBatch& batch, const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer = {}) {
  const PreferenceOutput kernel = preference_loss(batch, objective, normalizer);
  const PreferenceOutput tensors = detail::preference_loss_any_device(batch, objective, normalizer);
  const double loss = kernel.loss.item<double>();
  EXPECT_NEAR(loss, tensors.loss.item<double>(), 1e-14 * (10 + std::abs(loss)));
  EXPECT_TRUE(at::allclose(gradient(kernel.loss, batch.logps), gradient(tensors.loss, batch.logps),
                           1e-11, 1e-14));
  const auto expected = kernel.metrics.to_map();
  for (const auto& [name, value] : tensors.metrics.to_map()) {
    EXPECT_NEAR(value, expected.at(name), 1e-12) << name;
  }
}

TEST(PreferenceLossFace, EveryDevicePathEqualsTheKernel) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    for (size_t link = 0; link < kLinkNames.size(); ++link) {
      SCOPED_TRACE(std::string(row.name) + " " + std::string(kLinkNames[link]));
      PreferenceObjective objective = row.preset();
      choose_link(objective, link);
      expect_same_on_every_device(labelled(random_batch(4, 13), objective), objective);
    }
  }
}

TEST(PreferenceLossFace, EveryDevicePathEqualsTheKernelInWhatBatchesMayHave) {
  const PreferenceBatch plain = random_batch(4, 13);
  const at::Tensor& mask = plain.response_mask;
  const at::Tensor read = mask.logical_or(torch::rand({8, 13}) > 0.5);
  const at::Tensor logps = -torch::rand({8, 13}, at::kDouble) - 0.1;
  PreferenceBatch padded{.logps = logps.masked_fill(read.logical_not(), NAN).requires_grad_(),
                         .ref_logps = plain.ref_logps,
                         .response_mask = mask,
                         .nll_mask = read.to(at::kDouble) * 0.5,
                         .baselines = torch::randn({8}, at::kDouble),
                         .answer_weights = at::arange(8)};
  const auto packed = [&](const at::Tensor& tokens) { return tokens.detach().masked_select(read); };
  PreferenceBatch in_one_row{
      .logps = packed(padded.logps).requires_grad_(),
      .ref_logps = packed(padded.ref_logps),
      .response_mask = packed(mask),
      .nll_mask = packed(padded.nll_mask),
      .baselines = padded.baselines,
      .answer_weights = padded.answer_weights,
      .offsets = at::cat({at::zeros({1}, at::kLong), read.sum(1).cumsum(0)})};
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    for (size_t mean = 0; mean < kNllMeanNames.size(); ++mean) {
      SCOPED_TRACE(std::string(row.name) + " " + std::string(kNllMeanNames[mean]));
      PreferenceObjective objective = row.preset();
      objective.nll = {.coefficient = 0.5, .mean = NllMean(mean)};
      if (!objective.loss.takes_labels()) objective.ld_alpha = 0.25;
      const PairNormalizer step{.pairs = 9, .tokens = 50, .world_size = 2};
      const PreferenceBatch first = labelled(padded, objective);
      const PreferenceBatch second = labelled(in_one_row, objective);
      expect_same_on_every_device(first, objective);
      expect_same_on_every_device(second, objective, step);
      EXPECT_NEAR(preference_loss(first, objective).loss.item<double>(),
                  preference_loss(second, objective).loss.item<double>(), 1e-13);
      EXPECT_EQ(local_counts(first).tokens, local_counts(second).tokens);
    }
  }
}

TEST(PreferenceLossFace, AnswersPaddedAndPackedGiveTheSame) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    if (row.preset().score == PairScore::mean) continue;
    SCOPED_TRACE(row.name);
    const PreferenceBatch padded = random_batch(3, 8);
    const at::Tensor& mask = padded.response_mask;
    const auto sums = [&](const at::Tensor& tokens) {
      return at::where(mask, tokens, 0.0).sum(1).detach();
    };
    PreferenceBatch answers{.logps = sums(padded.logps).requires_grad_(),
                            .ref_logps = sums(padded.ref_logps)};
    const at::Tensor offsets = at::cat({at::zeros({1}, at::kLong), mask.sum(1).cumsum(0)});
    PreferenceBatch packed{.logps = padded.logps.detach().masked_select(mask).requires_grad_(),
                           .ref_logps = padded.ref_logps.masked_select(mask),
                           .response_mask = at::ones({offsets[-1].item<int64_t>()}, at::kBool),
                           .offsets = offsets};
    const auto as_taken = [&](const PreferenceBatch& batch) {
      return labelled(batch, row.preset());
    };
    const double expected = preference_loss(as_taken(padded), row.preset()).loss.item<double>();
    for (const PreferenceBatch& batch : {as_taken(answers), as_taken(packed)}) {
      for (const auto call : {preference_loss, detail::preference_loss_any_device}) {
        const PreferenceOutput out = call(batch, row.preset(), {});
        EXPECT_NEAR(out.loss.item<double>(), expected, 1e-13);
        EXPECT_EQ(gradient(out.loss, batch.logps).sizes(), batch.logps.sizes());
      }
    }
  }
}

// Beyond float32 the slopes of score and likelihood are of opposite sign.
TEST(PreferenceLossFace, LargeSlopesMeetBeforeTheyAreNarrowed) {
  const at::Tensor logps = torch::tensor({{-0.5f, -0.25f}, {-9.0f, -8.0f}});
  const PreferenceBatch batch{.logps = logps.clone().requires_grad_(),
                              .ref_logps = torch::tensor({{-0.5f, -0.25f}, {-0.5f, -0.25f}}),
                              .response_mask = torch::tensor({{1.0f, 1e-6f}, {1.0f, 1e-6f}})};
  PreferenceObjective objective = presets::apo_down();
  objective.nll.coefficient = 1;
  for (const double factor : {1.0, 1e42}) {
    const PairNormalizer step{.world_size = factor};
    const at::Tensor want = gradient(preference_loss(batch, objective, step).loss, batch.logps);
    const PreferenceOutput out = detail::preference_loss_any_device(batch, objective, step);
    const at::Tensor got = gradient(out.loss, batch.logps);
    EXPECT_TRUE(at::isfinite(got).all().item<bool>()) << got;
    EXPECT_TRUE(at::allclose(got, want, 1e-5)) << got << want;
  }
}

TEST(PreferenceLossFace, WhatCountsForNothingInABrokenAnswerHasNoSlope) {
  PreferenceBatch batch = random_batch(3, 7);
  batch.baselines = at::tensor({INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f});
  PreferenceObjective objective = presets::dpo();
  objective.ld_alpha = 0;
  const at::Tensor kernel = gradient(preference_loss(batch, objective).loss, batch.logps);
  const at::Tensor tensors =
      gradient(detail::preference_loss_any_device(batch, objective).loss, batch.logps);
  EXPECT_TRUE(kernel.isnan().any().item<bool>());
  EXPECT_FALSE(kernel.isnan().equal(batch.response_mask));
  EXPECT_TRUE(at::allclose(kernel, tensors, 1e-11, 1e-14, /*equal_nan=*/true));

  objective = presets::kto();
  objective.nll.coefficient = 0.5;
  batch.labels = at::tensor({0, 1, 1, 0, 1, 0});  // a bad answer has no likelihood
  const auto nll = [](const PreferenceOutput& out) { return out.metrics.to_map().at("nll"); };
  EXPECT_DOUBLE_EQ(nll(preference_loss(batch, objective)),
                   nll(detail::preference_loss_any_device(batch, objective)));
}

TEST(PreferenceLossFace, SecondDerivativesAreRefused) {
  const PreferenceBatch batch = random_batch(2, 5);
  const at::Tensor loss = dpo_loss(batch).loss;
  const at::Tensor first = torch::autograd::grad({loss}, {batch.logps}, {}, true, true)[0];
  try {
    torch::autograd::grad({first.sum()}, {batch.logps});
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_EQ(std::string(error.what_without_backtrace()).substr(0, 81),
              "preference_loss: backward must run once, got a second derivative. The loss has no");
  }
}

struct SoftAccuracy {
  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return sigmoid(-pair.margin());
  }
};

struct NeverWrapped : SoftAccuracy {};

TEST(PreferenceLossFace, AUsersFormulaRunsOnEveryDeviceOnceItIsWrapped) {
  const PreferenceBatch batch = random_batch(2, 5);
  PreferenceObjective objective = presets::dpo();
  objective.loss = NeverWrapped{};
  const double expected = preference_loss(batch, objective).loss.item<double>();
  EXPECT_THROW(detail::preference_loss_any_device(batch, objective), c10::ValueError);
  objective.loss = on_any_device(SoftAccuracy{});
  EXPECT_NEAR(detail::preference_loss_any_device(batch, objective).loss.item<double>(), expected,
              1e-15);
}

template <class Change>
std::string error_of(Change change) {
  PreferenceBatch batch = random_batch(2, 5, at::kFloat);
  change(batch);
  try {
    dpo_loss(batch);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(PreferenceLossFace, BadInputGetsOneClearError) {
  using B = PreferenceBatch;
  const std::string name = "preference_loss: ";
  EXPECT_EQ(error_of([](B& b) { b.logps = at::Tensor(); }), name + "logps must be given, got none");
  EXPECT_EQ(error_of([](B& b) { b.response_mask = at::Tensor(); }),
            name + "response_mask must be given, got none");
  EXPECT_EQ(error_of([](B& b) { b.ref_logps = at::Tensor(); }),
            name + "ref_logps must be given, got none. Pass them or reference = false");
  EXPECT_EQ(error_of([](B& b) { b.ref_logps = torch::zeros({4, 4}); }),
            name + "ref_logps must be [4, 5] like logps, got [4, 4]");
  EXPECT_EQ(error_of([](B& b) { b.logps = torch::zeros({4, 5}, at::kLong); }),
            name + "logps must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(
      error_of([](B& b) { b = {.logps = torch::zeros({3}), .ref_logps = torch::zeros({3})}; }),
      name +
          "logps must have an even number of rows, chosen answers before rejected ones, "
          "got 3");
}

}  // namespace
}  // namespace tether
