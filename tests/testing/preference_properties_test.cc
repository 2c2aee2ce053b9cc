#include <ATen/TensorOperators.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <string>

#include "testing/preference_checks.h"
#include "tests/rl/links.h"

// Every preference objective of the library against every property that its traits allow, and wrong
// losses that each must be caught by the property that names its fault.

namespace tether {
namespace {

using testing::check_preference_loss;
using testing::LossTraits;
using testing::traits_of;

using Call = PreferenceOutput (*)(const PreferenceBatch&, const PreferenceObjective&,
                                  const PairNormalizer&);

void expect_good(const PreferenceObjective& objective, Call call, const LossTraits& traits,
                 const testing::CheckOptions& options = {}) {
  const auto report = check_preference_loss(
      [&](const PreferenceBatch& batch, const PairNormalizer& step) {
        return call(batch, objective, step);
      },
      traits, options);
  EXPECT_TRUE(report.ok()) << report;
}

class PreferenceCatalogue : public ::testing::TestWithParam<PreferenceRow> {};

TEST_P(PreferenceCatalogue, KernelKeepsEveryPromise) {
  const PreferenceObjective objective = GetParam().preset();
  expect_good(objective, preference_loss, traits_of(objective));
}

TEST_P(PreferenceCatalogue, EveryLinkAndScoreKeepsThemToo) {
  PreferenceObjective objective = GetParam().preset();
  objective.score = objective.score == PairScore::sum ? PairScore::mean : PairScore::sum;
  for (size_t link = 0; link < kLinkNames.size(); ++link) {
    SCOPED_TRACE(kLinkNames[link]);
    choose_link(objective, link);
    expect_good(objective, preference_loss, traits_of(objective), {.batches = 3});
  }
}

TEST_P(PreferenceCatalogue, OneWithAnNllKeepsThemToo) {
  PreferenceObjective objective = GetParam().preset();
  if (objective.loss.takes_labels()) GTEST_SKIP() << "the steps' counts know no labels";
  objective.nll.coefficient = 0.5;
  for (const NllMean mean : {NllMean::token, NllMean::sequence_mean}) {
    objective.nll.mean = mean;
    expect_good(objective, preference_loss, traits_of(objective), {.batches = 1});
  }
  objective.nll.mean = NllMean::sequence_sum;
  objective.ld_alpha = 0.25;
  expect_good(objective, preference_loss, traits_of(objective), {.batches = 2});
  LossTraits traits = traits_of(objective);
  traits.bitwise = false;
  expect_good(objective, detail::preference_loss_any_device, traits, {.batches = 1});
}

TEST_P(PreferenceCatalogue, ALossWithoutAReferenceKeepsThemToo) {
  PreferenceObjective objective = GetParam().preset();
  objective.reference = false;
  expect_good(objective, preference_loss, traits_of(objective), {.batches = 3});
}

TEST_P(PreferenceCatalogue, AnyDevicePathKeepsTheSamePromisesUpToRounding) {
  const PreferenceObjective objective = GetParam().preset();
  LossTraits traits = traits_of(objective);
  traits.bitwise = false;
  expect_good(objective, detail::preference_loss_any_device, traits, {.batches = 3});
}

INSTANTIATE_TEST_SUITE_P(Rows, PreferenceCatalogue, ::testing::ValuesIn(kPreferenceCatalogue),
                         [](const auto& row) { return std::string(row.param.name); });

// ---- DPO in plain torch, right and wrong -------------------------------------------------------

struct Scores {
  at::Tensor chosen, rejected, mask;
};

Scores scores(const PreferenceBatch& batch, bool selected) {
  const auto wide = [](const at::Tensor& x) {
    return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  };
  const at::Tensor mask = wide(batch.response_mask);
  at::Tensor ratios = wide(batch.logps) - wide(batch.ref_logps);
  if (selected) ratios = at::where(mask != 0, ratios, at::zeros_like(ratios));
  const at::Tensor sums = (ratios * mask).sum(1);
  const int64_t pairs = batch.logps.size(0) / 2;
  return {sums.narrow(0, 0, pairs), sums.narrow(0, pairs, pairs), mask};
}

double pairs_of(const Scores& of) {
  const at::Tensor tokens = of.mask.sum(1);
  const int64_t pairs = of.chosen.size(0);
  const at::Tensor both = tokens.narrow(0, 0, pairs) + tokens.narrow(0, pairs, pairs);
  return (both > 0).sum().item<double>();
}

at::Tensor mean_of(const at::Tensor& losses, const Scores& of, const PairNormalizer& step) {
  const at::Tensor tokens = of.mask.sum(1);
  const int64_t pairs = of.chosen.size(0);
  const at::Tensor both = tokens.narrow(0, 0, pairs) + tokens.narrow(0, pairs, pairs);
  const double count = step.pairs.value_or(pairs_of(of));
  return (losses * (both > 0)).sum() / std::max(count, 1.0) * step.factor();
}

at::Tensor right(const PreferenceBatch& batch, const PairNormalizer& step) {
  const Scores of = scores(batch, true);
  return mean_of(-at::log_sigmoid(0.1 * (of.chosen - of.rejected)), of, step);
}

at::Tensor multiplied_mask(const PreferenceBatch& batch, const PairNormalizer& step) {
  const Scores of = scores(batch, false);
  return mean_of(-at::log_sigmoid(0.1 * (of.chosen - of.rejected)), of, step);
}

at::Tensor swapped(const PreferenceBatch& batch, const PairNormalizer& step) {
  const Scores of = scores(batch, true);
  return mean_of(-at::log_sigmoid(0.1 * (of.rejected - of.chosen)), of, step);
}

at::Tensor mean_of_micro_batch(const PreferenceBatch& batch, const PairNormalizer&) {
  return right(batch, {});
}

at::Tensor naive_log(const PreferenceBatch& batch, const PairNormalizer& step) {
  const Scores of = scores(batch, true);
  return mean_of(-(0.1 * (of.chosen - of.rejected)).sigmoid().log(), of, step);
}

at::Tensor without_reference(const PreferenceBatch& batch, const PairNormalizer& step) {
  PreferenceBatch bare = batch;
  bare.ref_logps = at::zeros_like(batch.ref_logps);
  const Scores of = scores(bare, true);
  return mean_of(-at::log_sigmoid(0.1 * (of.chosen - of.rejected)), of, step);
}

at::Tensor half_detached(const PreferenceBatch& batch, const PairNormalizer& step) {
  const Scores of = scores(batch, true);
  return mean_of(-at::log_sigmoid(0.1 * (of.chosen - of.rejected.detach())), of, step);
}

TEST(PlainPreferenceLosses, ARightOneRaisesNoAlarm) {
  const auto report = check_preference_loss(right);
  EXPECT_TRUE(report.ok()) << report;
}

struct Wrong {
  const char* name;
  at::Tensor (*loss)(const PreferenceBatch&, const PairNormalizer&);
  const char* caught_by;
};

class WrongPreferenceLosses : public ::testing::TestWithParam<Wrong> {};

TEST_P(WrongPreferenceLosses, AreCaughtByTheirProperty) {
  const auto report =
      check_preference_loss(GetParam().loss, {.needs_ref_logps = true}, {.batches = 4});
  const auto& property = report[GetParam().caught_by];
  EXPECT_EQ(property.outcome, testing::Outcome::fails) << report;
  EXPECT_LE(property.rows * property.columns, 4) << property.detail << "\n" << property.batch;
}

INSTANTIATE_TEST_SUITE_P(Rebuilt, WrongPreferenceLosses,
                         ::testing::Values(Wrong{"MultipliedMask", multiplied_mask, "poison"},
                                           Wrong{"Swapped", swapped, "pull_back"},
                                           Wrong{"MeanOfMicroBatch", mean_of_micro_batch, "split"},
                                           Wrong{"NaiveLog", naive_log, "finite"},
                                           Wrong{"WithoutReference", without_reference, "shift"},
                                           Wrong{"HalfDetached", half_detached,
                                                 "finite_difference"}),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace tether
