#include "face/eigen_estimators.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/error_message.h"

namespace tether {
namespace {

using Eigen::ArrayXd;
using Eigen::ArrayXXd;
using RowMajor = Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Mask = Eigen::Array<bool, Eigen::Dynamic, Eigen::Dynamic>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

ArrayXXd random_array(int rows, int columns, unsigned seed) {
  std::srand(seed);
  return ArrayXXd::Random(rows, columns);
}

Mask some_mask(int rows, int columns) {
  Mask out(rows, columns);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out(i, j) = (3 * i + j) % 4 != 1;
  }
  return out;
}

void expect_equal(const ArrayXXd& got, const ArrayXXd& want) {
  ASSERT_EQ(got.rows(), want.rows());
  ASSERT_EQ(got.cols(), want.cols());
  EXPECT_TRUE((got == want).all());
}

TEST(EigenEstimators, KlOfElementsTakesExpressions) {
  const ArrayXXd ref = random_array(3, 4, 1), policy = random_array(3, 4, 2);
  const ArrayXXd d = ref - policy;
  expect_equal(eigen::k1(ref - policy), -d);
  EXPECT_TRUE(eigen::k2(ref - policy).isApprox(d * d / 2));
  EXPECT_TRUE(eigen::k3(ref - policy).isApprox(d.exp() - 1 - d, 1e-12));
  EXPECT_TRUE(eigen::k_lambda(d, 0.5).isApprox(0.5 * (d.exp() - 1) - d, 1e-12));
  expect_equal(eigen::k3(d.cast<float>().cast<double>()), eigen::k3(d.cast<float>()));
}

TEST(EigenEstimators, StorageOrderAndStridesChangeNothing) {
  const ArrayXXd rewards = random_array(5, 7, 3), values = random_array(5, 7, 4);
  const Mask mask = some_mask(5, 7);
  const Gae options{.gamma = 0.9, .lambda = 0.8};
  const auto want = eigen::generalized_advantage_estimation(rewards, values, mask, options);
  const RowMajor by_rows = rewards;
  ArrayXXd wide = ArrayXXd::Constant(10, 14, kNan);
  Eigen::Map<ArrayXXd, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> spread(
      wide.data(), 5, 7, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(20, 2));
  spread = values;
  const auto got = eigen::generalized_advantage_estimation(by_rows, spread, mask, options);
  expect_equal(got.advantages, want.advantages);
  expect_equal(got.returns, want.returns);
  const auto block = eigen::generalized_advantage_estimation(rewards.topRows(2), values.topRows(2),
                                                             mask.topRows(2), options);
  expect_equal(block.advantages, want.advantages.topRows(2));
}

TEST(EigenEstimators, AdvantagesAreTheRecursions) {
  const ArrayXXd rewards = (ArrayXXd(1, 3) << 1, kNan, 2).finished();
  const ArrayXXd values = (ArrayXXd(1, 3) << 0.5, kNan, 1).finished();
  const ArrayXXd mask = (ArrayXXd(1, 3) << 1, 0, 1).finished();
  const ArrayXd bootstrap = ArrayXd::Constant(1, 8.0);
  expect_equal(eigen::discounted_returns(rewards, mask, {.gamma = 0.5}, bootstrap),
               (ArrayXXd(1, 3) << 4, 0, 6).finished());
  const auto out = eigen::generalized_advantage_estimation(
      {.rewards = rewards, .values = values, .response_mask = mask, .bootstrap = bootstrap},
      {.gamma = 0.5, .lambda = 0.5});
  // delta_2 = 2 + 4 - 1 = 5; delta_0 = 1 + 0.5 - 0.5 = 1, A_0 = 1 + 5 / 4
  expect_equal(out.advantages, (ArrayXXd(1, 3) << 2.25, 0, 5).finished());
  expect_equal(out.returns, (ArrayXXd(1, 3) << 2.75, 0, 6).finished());
}

TEST(EigenEstimators, AdvantagesByAnyEstimator) {
  const ArrayXXd rewards = random_array(3, 4, 6), values = random_array(3, 4, 7),
                 mask = ArrayXXd::Ones(3, 4);
  const eigen::AdvantageBatch batch{.rewards = rewards, .values = values, .response_mask = mask};
  const Gae options{.gamma = 0.5, .lambda = 0.5};
  expect_equal(eigen::advantage(batch, options).advantages,
               eigen::generalized_advantage_estimation(batch, options).advantages);
  EXPECT_EQ(message([&] { eigen::advantage({.rewards = rewards, .response_mask = mask}, Gae{}); }),
            "advantage: values must be given, got none");

  const ArrayXd answers = (ArrayXd(4) << 1, 2, 6, 0).finished();
  const ArrayXd want = (ArrayXd(4) << -0.5, 0.5, 3, -3).finished();
  const GroupAdvantage rule{.scale = AdvantageScale::none};
  EXPECT_TRUE((eigen::advantage({.rewards = answers, .group_size = 2}, rule) == want).all());
  EXPECT_EQ(message([&] {
              eigen::advantage({.rewards = answers, .lengths = ArrayXd::Ones(3), .group_size = 2},
                               rule);
            }),
            "advantage: lengths must be [4] like rewards, got [3]");
}

TEST(EigenEstimators, OneValuePerRowMayLieInARowOrAColumn) {
  const ArrayXXd rewards = random_array(3, 4, 6), mask = ArrayXXd::Ones(3, 4);
  const ArrayXd column = random_array(3, 1, 7);
  const ArrayXXd row = column.transpose();
  const DiscountedReturns options{.gamma = 0.9};
  expect_equal(eigen::discounted_returns(rewards, mask, options, row),
               eigen::discounted_returns(rewards, mask, options, column));
}

TEST(EigenEstimators, GroupsWhiteningAndKlReport) {
  const ArrayXd rewards = (ArrayXd(4) << 1, 2, 6, 0).finished();
  const GroupAdvantage options{.scale = AdvantageScale::none};
  const ArrayXd want = (ArrayXd(4) << -0.5, 0.5, 3, -3).finished();
  EXPECT_TRUE((eigen::group_advantage(rewards, 2, options) == want).all());
  const Eigen::Array<int64_t, Eigen::Dynamic, 1> ids =
      (Eigen::Array<int64_t, Eigen::Dynamic, 1>(4) << 9, 9, -1, -1).finished();
  EXPECT_TRUE((eigen::group_advantage(rewards, ids, options) == want).all());

  const Mask mask = some_mask(4, 6);
  ArrayXXd values = 3 + random_array(4, 6, 5);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 6; ++j) {
      if (!mask(i, j)) values(i, j) = kNan;
    }
  }
  const ArrayXXd white = eigen::whiten(values, mask);
  const double n = double(mask.count());
  EXPECT_NEAR(white.sum(), 0, 1e-12);
  EXPECT_NEAR(white.square().sum() / (n - 1), 1, 1e-6);
  const KlReport report = eigen::kl_report(values, mask, {.estimator = KlEstimator::k1});
  EXPECT_NEAR(report.mean, -eigen::moments(values, mask).mean, 1e-14);
  const ArrayXXd shifted = values - 1;
  const MismatchReport mismatch = eigen::mismatch_report(values, shifted, mask);
  EXPECT_NEAR(mismatch.k1, -1, 1e-14);
  EXPECT_EQ(mismatch.tokens, n);
}

TEST(EigenEstimators, ExactKl) {
  const ArrayXXd logits_q = random_array(3, 5, 6), logits_p = random_array(3, 5, 7);
  const auto log_softmax = [](ArrayXXd x) -> ArrayXXd {
    x.colwise() -= x.exp().rowwise().sum().log();
    return x;
  };
  const ArrayXXd log_q = log_softmax(logits_q), log_p = log_softmax(logits_p);
  const auto out = eigen::categorical_kl(log_q, log_p);
  const ArrayXd want = (log_q.exp() * (log_q - log_p)).rowwise().sum();
  EXPECT_TRUE(out.kl.isApprox(want, 1e-12));
  EXPECT_TRUE(out.dlogits_p.isApprox(log_p.exp() - log_q.exp(), 1e-12));
  const double step = 1e-6;
  ArrayXXd up = logits_q, down = logits_q;
  up(1, 2) += step;
  down(1, 2) -= step;
  const double slope = eigen::categorical_kl(log_softmax(up), log_p).kl(1) -
                       eigen::categorical_kl(log_softmax(down), log_p).kl(1);
  EXPECT_NEAR(out.dlogits_q(1, 2), slope / (2 * step), 1e-9);
  const ArrayXXd a = random_array(2, 2, 8), b = random_array(2, 2, 9);
  EXPECT_EQ(eigen::bernoulli_kl(a, b)(1, 0), bernoulli_kl(a(1, 0), b(1, 0)));
  EXPECT_EQ(eigen::gaussian_kl(a, b, b, a)(0, 1), gaussian_kl(a(0, 1), b(0, 1), b(0, 1), a(0, 1)));
}

TEST(EigenEstimators, ShapesAreChecked) {
  const ArrayXXd a = ArrayXXd::Zero(2, 3), b = ArrayXXd::Zero(2, 4);
  const Mask mask = Mask::Ones(2, 3);
  EXPECT_EQ(message([&] { eigen::kl_report(b, mask); }),
            "kl_report: response_mask must be [2, 4] like log_ratios, got [2, 3]");
  EXPECT_EQ(message([&] { eigen::generalized_advantage_estimation(a, b, mask); }),
            "generalized_advantage_estimation: values must be [2, 3] like rewards, got [2, 4]");
  EXPECT_EQ(message([&] { eigen::discounted_returns(a, mask, {}, ArrayXd(ArrayXd::Zero(3))); }),
            "discounted_returns: bootstrap must be [2], got [3, 1]");
  EXPECT_EQ(message([&] { eigen::categorical_kl(a, b); }),
            "categorical_kl: log_p must be [2, 3] like log_q, got [2, 4]");
  EXPECT_EQ(message([&] { eigen::whiten(b, mask); }),
            "moments: response_mask must be [2, 4] like values, got [2, 3]");
}

}  // namespace
}  // namespace tether
