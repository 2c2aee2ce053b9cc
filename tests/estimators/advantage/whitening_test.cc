#include "estimators/advantage/whitening.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "tests/error_message.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Values {
  int64_t rows, columns;
  std::vector<double> values, mask, out;

  Values(int64_t b, int64_t t, double mean, double spread) : rows(b), columns(t) {
    std::mt19937 random(4);
    std::normal_distribution<double> normal(mean, spread);
    for (int64_t i = 0; i < b * t; ++i) {
      mask.push_back(random() % 3 != 0);
      values.push_back(mask.back() != 0 ? normal(random) : kNaN);
    }
    out.assign(values.size(), kNaN);
  }
  RowLayout layout() const { return {.rows = rows, .columns = columns}; }
  ConstArray view(const std::vector<double>& array) const {
    return {array.data(), DType::float64, columns, 1};
  }
  WhiteningArrays arrays() const { return {layout(), view(values), view(mask)}; }
  Moments of() const { return moments(arrays()); }
  void whitened(const Moments& step, const Whitening& options = {}) {
    whiten(arrays(), step, options, {out.data(), DType::float64, columns, 1});
  }
};

// 1000 + 0.01 z: E[x^2] - mean^2 in single precision is negative here.
TEST(Whitening, MeanZeroAndVarianceOneFarFromZero) {
  Values batch(7, 400, 1000, 0.01);
  batch.whitened(batch.of(), {.epsilon = 0});
  double n = 0, sum = 0, squares = 0;
  for (size_t i = 0; i < batch.out.size(); ++i) {
    if (batch.mask[i] == 0) {
      EXPECT_EQ(batch.out[i], 0);
      continue;
    }
    n += 1;
    sum += batch.out[i];
    squares += batch.out[i] * batch.out[i];
  }
  EXPECT_NEAR(sum / n, 0, 1e-9);
  EXPECT_NEAR(squares / (n - 1), 1, 1e-9);
  batch.whitened(batch.of(), {.epsilon = 0, .shift_mean = false});
  double mean = 0;
  for (size_t i = 0; i < batch.out.size(); ++i) mean += batch.out[i] / n;
  EXPECT_NEAR(mean, 1000, 0.01);
}

TEST(Whitening, MomentsOfPartsMergeIntoThoseOfTheWhole) {
  const Values whole(6, 50, -3, 2);
  Moments merged;
  for (int64_t row = 0; row < 6; ++row) {
    const auto part = [&](const std::vector<double>& array) {
      return ConstArray{array.data() + row * 50, DType::float64, 50, 1};
    };
    merged =
        merged.merged(moments({{.rows = 1, .columns = 50}, part(whole.values), part(whole.mask)}));
  }
  EXPECT_EQ(merged.count, whole.of().count);
  EXPECT_NEAR(merged.mean, whole.of().mean, 1e-14);
  EXPECT_NEAR(merged.squares, whole.of().squares, 1e-10);
}

TEST(Whitening, EqualValuesOneTokenAndNoneGiveZero) {
  Values equal(2, 10, 0, 1);
  for (double& value : equal.values) value = 0.7;
  equal.whitened(equal.of(), {.epsilon = 0});
  for (double each : equal.out) EXPECT_EQ(each, 0);
  Values batch(1, 4, 0, 1);
  for (const double active : {1.0, 0.0}) {
    batch.mask = {active, 0, 0, 0};
    batch.values[0] = 3;
    batch.whitened(batch.of());
    for (double each : batch.out) EXPECT_EQ(each, 0);
  }
}

// The deviations of 1, 0, 0 over sqrt(1 / 3), of 1, -1, 0 over 1.
TEST(Whitening, ValuesWhoseSquaresOverflowAreWhitened) {
  for (const auto& [values, wanted] : std::vector<std::pair<std::vector<double>, double>>{
           {{1e200, 0, 1}, 2 / std::sqrt(3.0)}, {{1.7e308, -1.7e308, 0}, 1}}) {
    Values batch(1, 3, 0, 1);
    batch.values = values;
    batch.mask = {1, 1, 1};
    batch.whitened(batch.of());
    EXPECT_NEAR(batch.out[0], wanted, 1e-12);
    EXPECT_NEAR(batch.out[0] + batch.out[1] + batch.out[2], 0, 1e-12);
  }
}

TEST(Whitening, NaNAndInfinityComeOut) {
  for (const double broken : {kNaN, double(INFINITY)}) {
    Values values(1, 6, 0, 1);
    values.mask = {1, 1, 1, 1, 1, 0};
    values.values = {1, broken, 2, 3, 4, kNaN};
    values.whitened(values.of());
    for (size_t i = 0; i < 5; ++i) EXPECT_TRUE(std::isnan(values.out[i])) << i;
    EXPECT_EQ(values.out[5], 0);
  }
}

TEST(Whitening, NothingMergesWithAnything) {
  const Moments some{2, 1e200, 1};
  for (const Moments& merged : {Moments{}.merged(some), some.merged(Moments{})}) {
    EXPECT_EQ(merged.count, 2);
    EXPECT_EQ(merged.mean, 1e200);
    EXPECT_EQ(merged.squares, 1);
  }
}

TEST(Whitening, BadInputGetsOneClearError) {
  Values batch(1, 4, 0, 1);
  EXPECT_EQ(message([&] { batch.whitened({}, {.epsilon = -1}); }),
            "whiten: epsilon must be in [0, 1e+12], got -1");
  EXPECT_EQ(message([&] { moments({batch.layout(), {}, batch.view(batch.mask)}); }),
            "moments: values must be given, got none");
}

}  // namespace
}  // namespace tether
