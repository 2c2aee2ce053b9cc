#include "rl/kernels/value_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/error_message.h"
#include "tests/rl/value_batch.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct TokenLoss {
  double loss, slope;
};

// By cases, as the text of rl/value_objective.h has it.
TokenLoss by_cases(double value, double old_value, double target, double range) {
  const double clipped = std::min(std::max(value, old_value - range), old_value + range);
  const double error = value - target, other = clipped - target;
  if (other * other > error * error) return {other * other / 2, clipped == value ? error : 0};
  return {error * error / 2, error};
}

TEST(ValueLoss, IsTheMeanOfTheLargerErrorWithItsGradient) {
  ValueRows<double> batch(4, 300);
  const ValueTotals out = batch.run({.loss = ClippedSquaredError{.clip_range = 0.2}});
  double n = 0, sum = 0, stuck = 0;
  for (double weight : batch.mask) n += weight;
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    if (batch.mask[i] == 0) {
      EXPECT_EQ(batch.dvalues[i], 0);
      continue;
    }
    const TokenLoss token = by_cases(batch.values[i], batch.old_values[i], batch.returns[i], 0.2);
    sum += token.loss / n;
    stuck += token.slope == 0;
    EXPECT_NEAR(batch.dvalues[i], token.slope / n, 1e-16);
  }
  EXPECT_NEAR(out.loss, sum, 1e-14);
  EXPECT_GT(stuck, 50);
  EXPECT_DOUBLE_EQ(out.metrics.to_map().at("value_clip_fraction"), stuck / n);
}

TEST(ValueLoss, WithoutClippingItIsHalfTheSquaredError) {
  ValueRows<float> batch(2, 50);
  const ValueTotals off = batch.run({.loss = ClippedSquaredError{.clip_range = infinity}});
  ValueArrays arrays = batch.arrays();
  arrays.old_values = {};
  EXPECT_EQ(value_loss(arrays, {}, {}, {}).loss, off.loss);
  double sum = 0, n = 0;
  for (size_t i = 0; i < 100; ++i) {
    if (batch.mask[i] == 0) continue;
    sum += 0.5 * std::pow(double(batch.values[i]) - double(batch.returns[i]), 2);
    n += 1;
  }
  EXPECT_NEAR(off.loss, sum / n, 1e-6);
}

TEST(ValueLoss, ExplainedVarianceIsOneForTheReturnsAndZeroForTheirMean) {
  ValueRows<double> batch(3, 80);
  batch.values = batch.returns;
  EXPECT_EQ(batch.run({}).metrics.to_map().at("explained_variance"), 1);
  for (double& value : batch.values) value = 0.25;
  batch.old_values = batch.values;
  EXPECT_NEAR(batch.run({}).metrics.to_map().at("explained_variance"), 0, 1e-14);
}

TEST(ValueLoss, ReturnsThatDoNotVaryExplainNothingAndNaNComesOut) {
  ValueRows<double> batch(1, 500);
  batch.mask.assign(500, 1);
  batch.returns.assign(500, 0.1);
  const auto explained = [&] { return batch.run({}).metrics.to_map().at("explained_variance"); };
  EXPECT_EQ(explained(), 0);
  batch.returns[3] = kNaN;
  EXPECT_TRUE(std::isnan(explained()));
}

// Returns of mean 1e9 that vary by 1, of which the values explain 3/4: half of each deviation.
TEST(ValueLoss, ExplainedVarianceBesideAMeanThatIsABillionTimesLarger) {
  constexpr double kMean = 1e9;
  ValueRows<double> batch(3, 600);
  for (size_t i = 0; i < batch.values.size(); ++i) {
    batch.values[i] = kMean + batch.returns[i] / 2 + (i < 600 ? 1 : 5e8);
    batch.returns[i] += kMean;
    batch.old_values[i] = batch.values[i];
  }
  const auto part = [&](int64_t begin, int64_t count) {
    ValueArrays arrays = batch.arrays();
    arrays.layout.rows = count;
    for (ConstArray* each :
         {&arrays.values, &arrays.returns, &arrays.response_mask, &arrays.old_values}) {
      each->data = static_cast<const double*>(each->data) + begin * batch.columns;
    }
    return value_loss(arrays, {}, {}, {}).metrics;
  };
  const auto explained = [](const ValueMetrics& metrics) {
    return metrics.to_map().at("explained_variance");
  };
  EXPECT_NEAR(explained(part(0, 1)), 0.75, 1e-6);
  EXPECT_NEAR(explained(part(1, 2)), 0.75, 1e-6);
  ValueMetrics both = part(1, 1), sum = both;
  const ValueMetrics last = part(2, 1);
  both.merge(last);
  EXPECT_NEAR(explained(both), 0.75, 1e-6);
  for (size_t i = 0; i < sum.sums.size(); ++i) sum.sums[i] += last.sums[i];
  EXPECT_NEAR(explained(sum), 0.75, 0.01);  // without what the means of the rows vary by
  // Values that are 5e8 off in two of three rows explain less than nothing.
  ValueMetrics whole = part(0, 1);
  whole.merge(part(1, 2));
  EXPECT_NEAR(explained(whole) / explained(part(0, 3)), 1, 1e-6);
  EXPECT_LT(explained(whole), -1e16);
}

TEST(ValueLoss, ConstantRowsDoNotVaryThoughTheirMeansAreRounded) {
  ValueRows<double> batch(7, 33);
  for (double& each : batch.returns) each = each == each ? 0.1 : each;
  EXPECT_EQ(batch.run({}).metrics.to_map().at("explained_variance"), 0);
}

TEST(ValueLoss, InfinityAtAnActiveSlotIsNaNThoughErrorsSaturate) {
  for (std::vector<float> ValueRows<float>::* array :
       {&ValueRows<float>::values, &ValueRows<float>::old_values, &ValueRows<float>::returns}) {
    for (const float infinite : {INFINITY, -INFINITY}) {
      ValueRows<float> batch(1, 4);
      for (auto* each : {&batch.values, &batch.old_values, &batch.returns}) each->assign(4, 1);
      batch.mask = {1, 1, 1, 0};
      (batch.*array)[1] = infinite;
      (batch.*array)[3] = infinite;
      const ValueTotals out = batch.run({});
      EXPECT_TRUE(std::isnan(out.loss));
      using M = ValueMetrics;
      const bool returns = array == &ValueRows<float>::returns;
      const bool errors = array != &ValueRows<float>::old_values;
      for (M::Sum sum : {M::kReturn, M::kReturnSquared, M::kReturnSpread}) {
        EXPECT_EQ(std::isnan(out.metrics.sums[sum]), returns) << sum;
      }
      for (M::Sum sum : {M::kError, M::kErrorSquared, M::kErrorSpread}) {
        EXPECT_EQ(std::isnan(out.metrics.sums[sum]), errors) << sum;
      }
      EXPECT_TRUE(std::isnan(batch.dvalues[1]));
      EXPECT_TRUE(std::isfinite(batch.dvalues[0]));
      EXPECT_EQ(batch.dvalues[3], 0);
    }
  }
}

// V = R, but V_old + 0.2 is farther off: its error is the loss, without a gradient.
TEST(ValueLoss, AValueThatIsRightMayBeClipped) {
  ValueRows<double> batch(1, 1);
  batch.mask = {1};
  batch.values = batch.returns = {2};
  batch.old_values = {0};
  const ValueTotals out = batch.run({});
  EXPECT_DOUBLE_EQ(out.loss, 1.8 * 1.8 / 2);
  EXPECT_EQ(batch.dvalues[0], 0);
  EXPECT_EQ(out.metrics.to_map().at("value_clip_fraction"), 1);
}

TEST(ValueLoss, BadInputGetsOneClearErrorBeforeAnythingIsWritten) {
  const auto error = [](auto change) {
    ValueRows<float> batch(2, 3);
    ValueArrays arrays = batch.arrays();
    ValueObjective objective;
    change(batch, arrays, objective);
    const MutableArray dvalues{batch.dvalues.data(), DType::float32, 3, 1};
    const std::string out = message([&] { value_loss(arrays, objective, {}, dvalues); });
    EXPECT_TRUE(std::isnan(batch.dvalues[0])) << out;
    return out;
  };
  using B = ValueRows<float>;
  using A = ValueArrays;
  using O = ValueObjective;
  EXPECT_EQ(error([](B&, A& a, O&) { a.returns = {}; }),
            "value_loss: returns must be given, got none");
  EXPECT_EQ(error([](B&, A&, O& o) { o.loss = ClippedSquaredError{.clip_range = -1}; }),
            "value_loss: clip_range must be at least 0, got -1");
  EXPECT_EQ(error([](B& b, A&, O&) { b.mask[3] = -1; }),
            "value_loss: response_mask must be in [0, 1], got -1 at [1, 0]");
}

}  // namespace
}  // namespace tether
