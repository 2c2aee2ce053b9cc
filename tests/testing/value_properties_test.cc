#include <ATen/TensorOperators.h>
#include <ATen/ops/max.h>
#include <ATen/ops/min.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <string>

#include "testing/value_checks.h"

// The value objective against every property, and wrong losses that each must be caught by the
// property that names its fault.

namespace tether {
namespace {

using testing::check_value_loss;

using Call = ValueOutput (*)(const ValueBatch&, const ValueObjective&, const Normalizer&);

void expect_good(const ValueObjective& objective, const testing::CheckOptions& options = {},
                 Call call = value_loss) {
  testing::LossTraits traits = testing::traits_of(objective);
  traits.bitwise = call == Call(value_loss);
  const auto report = check_value_loss(
      [&](const ValueBatch& batch, const Normalizer& step) { return call(batch, objective, step); },
      traits, options);
  EXPECT_TRUE(report.ok()) << report;
}

class ValueCatalogue : public ::testing::TestWithParam<ValueRow> {};

TEST_P(ValueCatalogue, KernelAndAnyDevicePathKeepEveryPromise) {
  expect_good(GetParam().preset());
  expect_good(GetParam().preset(), {.batches = 3}, detail::value_loss_any_device);
}

INSTANTIATE_TEST_SUITE_P(Rows, ValueCatalogue, ::testing::ValuesIn(kValueCatalogue),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(ValueObjective, KeepsEveryPromiseInEveryAggregation) {
  for (const Aggregation& aggregation :
       {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
        sequence_sum_over_constant(9), token_sum()}) {
    SCOPED_TRACE(kAggregationNames[static_cast<size_t>(aggregation.mode)]);
    expect_good({.aggregation = aggregation});
  }
}

TEST(ValueObjective, KeepsThemForOtherRangesAndWithoutClipping) {
  for (const double range : {0.5, infinity}) {
    SCOPED_TRACE(range);
    expect_good({.loss = ClippedSquaredError{.clip_range = range}}, {.batches = 4});
  }
}

// ---- the clipped error in plain torch, right and wrong -----------------------------------------

struct Inputs {
  at::Tensor values, old_values, returns, mask;
};

Inputs inputs(const ValueBatch& batch, bool selected) {
  const auto wide = [](const at::Tensor& x) {
    return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  };
  const at::Tensor mask = wide(batch.response_mask);
  const auto read = [&](const at::Tensor& x) {
    const at::Tensor out = wide(x);
    return selected ? at::where(mask != 0, out, at::zeros_like(out)) : out;
  };
  return {read(batch.values), read(batch.old_values), read(batch.returns), mask};
}

at::Tensor mean_of(const at::Tensor& losses, const Inputs& in, const Normalizer& step) {
  const double tokens = step.policy ? *step.policy : in.mask.sum().item<double>();
  return (losses * in.mask).sum() / (tokens > 0 ? tokens : 1) * step.factor();
}

at::Tensor clipped_error(const Inputs& in, double range) {
  const at::Tensor inside =
      at::min(at::max(in.values, in.old_values - range), in.old_values + range);
  return at::max((in.values - in.returns).square(), (inside - in.returns).square()) / 2;
}

at::Tensor right(const ValueBatch& batch, const Normalizer& step) {
  const Inputs in = inputs(batch, true);
  return mean_of(clipped_error(in, 0.2), in, step);
}

at::Tensor multiplied_mask(const ValueBatch& batch, const Normalizer& step) {
  const Inputs in = inputs(batch, false);
  return mean_of(clipped_error(in, 0.2), in, step);
}

at::Tensor never_clips(const ValueBatch& batch, const Normalizer& step) {
  const Inputs in = inputs(batch, true);
  return mean_of((in.values - in.returns).square() / 2, in, step);
}

at::Tensor takes_the_smaller_error(const ValueBatch& batch, const Normalizer& step) {
  const Inputs in = inputs(batch, true);
  const at::Tensor inside = at::min(at::max(in.values, in.old_values - 0.2), in.old_values + 0.2);
  return mean_of(at::min((in.values - in.returns).square(), (inside - in.returns).square()) / 2, in,
                 step);
}

at::Tensor adds_the_value(const ValueBatch& batch, const Normalizer& step) {
  const Inputs in = inputs(batch, true);
  return mean_of(clipped_error(in, 0.2) + 0.01 * in.values, in, step);
}

at::Tensor mean_of_micro_batch(const ValueBatch& batch, const Normalizer&) {
  return right(batch, {});
}

constexpr testing::ClipRange kRange{.low = 0.2, .high = 0.2};

TEST(PlainValueLosses, ARightOneRaisesNoAlarm) {
  const auto report = check_value_loss(right, {.clip = kRange});
  EXPECT_TRUE(report.ok()) << report;
}

struct Wrong {
  const char* name;
  at::Tensor (*loss)(const ValueBatch&, const Normalizer&);
  const char* caught_by;
};

class WrongValueLosses : public ::testing::TestWithParam<Wrong> {};

TEST_P(WrongValueLosses, AreCaughtByTheirProperty) {
  const auto report = check_value_loss(GetParam().loss, {.clip = kRange}, {.batches = 4});
  const auto& property = report[GetParam().caught_by];
  EXPECT_EQ(property.outcome, testing::Outcome::fails) << report;
  EXPECT_LE(property.rows * property.columns, 4) << property.detail << "\n" << property.batch;
}

INSTANTIATE_TEST_SUITE_P(Rebuilt, WrongValueLosses,
                         ::testing::Values(Wrong{"MultipliedMask", multiplied_mask, "poison"},
                                           Wrong{"NeverClips", never_clips, "clip"},
                                           Wrong{"TakesTheSmallerError", takes_the_smaller_error,
                                                 "clip"},
                                           Wrong{"AddsTheValue", adds_the_value, "shift"},
                                           Wrong{"MeanOfMicroBatch", mean_of_micro_batch, "split"}),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace tether
