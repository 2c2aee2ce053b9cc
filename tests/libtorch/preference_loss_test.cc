#include "libtorch/preference_loss.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <string>

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

TEST(PreferenceLossFace, EveryDevicePathEqualsTheKernel) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    for (size_t link = 0; link < kLinkNames.size(); ++link) {
      SCOPED_TRACE(std::string(row.name) + " " + std::string(kLinkNames[link]));
      const PreferenceBatch batch = random_batch(4, 13);
      PreferenceObjective objective = row.preset();
      choose(objective.link, link);
      const PreferenceOutput kernel = preference_loss(batch, objective);
      const PreferenceOutput tensors = detail::preference_loss_any_device(batch, objective);
      EXPECT_NEAR(kernel.loss.item<double>(), tensors.loss.item<double>(), 1e-13);
      EXPECT_TRUE(at::allclose(gradient(kernel.loss, batch.logps),
                               gradient(tensors.loss, batch.logps), 1e-11, 1e-14));
      const auto expected = kernel.metrics.to_map();
      for (const auto& [name, value] : tensors.metrics.to_map()) {
        EXPECT_NEAR(value, expected.at(name), 1e-12) << name;
      }
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
    const double expected = preference_loss(padded, row.preset()).loss.item<double>();
    for (const PreferenceBatch& batch : {answers, packed}) {
      for (const auto call : {preference_loss, detail::preference_loss_any_device}) {
        const PreferenceOutput out = call(batch, row.preset(), {});
        EXPECT_NEAR(out.loss.item<double>(), expected, 1e-13);
        EXPECT_EQ(gradient(out.loss, batch.logps).sizes(), batch.logps.sizes());
      }
    }
  }
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
