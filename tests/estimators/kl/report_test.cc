#include "estimators/kl/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "estimators/kl/forms.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// Samples z of N(0, 1) against N(delta, 1): d = delta z - delta^2 / 2, KL = delta^2 / 2.
struct Gaussians {
  int64_t rows, columns;
  std::vector<double> log_ratios, mask;

  Gaussians(double delta, int64_t b, int64_t t) : rows(b), columns(t) {
    std::mt19937_64 random(11);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < b * t; ++i) {
      mask.push_back(random() % 8 != 0);
      const double d = delta * normal(random) - delta * delta / 2;
      log_ratios.push_back(mask.back() != 0 ? d : std::nan(""));
    }
  }
  ConstArray view(const std::vector<double>& array) const {
    return {array.data(), DType::float64, columns, 1};
  }
  KlReport report(const KlReportOptions& options) const {
    return kl_report({{.rows = rows, .columns = columns}, view(log_ratios), view(mask)}, options);
  }
};

TEST(KlEstimator, MeanErrorAndLambdaAreThoseOfTheTheory) {
  const double s = 0.25, kl = s / 2;  // delta = 1/2
  const Gaussians batch(0.5, 2000, 50);
  // spec of the estimators: variances s, s^2/2 + s^3/4, e^s - 1 - s, s - s^2/(e^s - 1)
  const double variances[] = {s, s * s / 2 + s * s * s / 4, std::expm1(s) - s,
                              s - s * s / std::expm1(s)};
  const double biases[] = {0, s * s / 8, 0, 0};
  for (int i = 0; i < 4; ++i) {
    const KlReport out = batch.report({.estimator = static_cast<KlEstimator>(i)});
    const double error = std::sqrt(variances[i] / out.tokens);
    EXPECT_NEAR(out.mean, kl + biases[i], 4 * error) << i;
    EXPECT_NEAR(out.standard_error, error, 0.1 * error) << i;
    EXPECT_NEAR(out.ratio_excess, 0, 4 * std::sqrt(std::expm1(s) / out.tokens));
    EXPECT_NEAR(out.ess / out.tokens, std::exp(-s), 0.02);
    EXPECT_EQ(out.sequences, 2000);
  }
  EXPECT_NEAR(batch.report({.estimator = KlEstimator::k_lambda}).lambda, s / std::expm1(s), 0.02);
}

TEST(KlEstimator, LambdaOneIsK3AndLambdaZeroIsK1) {
  const Gaussians batch(0.7, 20, 30);
  const auto mean = [&](KlReportOptions options) { return batch.report(options).mean; };
  EXPECT_NEAR(mean({KlEstimator::k_lambda, 1}), mean({KlEstimator::k3}), 1e-14);
  EXPECT_NEAR(mean({KlEstimator::k_lambda, 0}), mean({KlEstimator::k1}), 1e-14);
}

// Tokens of a sequence that are copies of one another carry the information of one.
TEST(KlEstimator, TheStandardErrorIsOverSequences) {
  const Gaussians one(0.5, 400, 1);
  Gaussians copies(0.5, 400, 1);
  copies.columns = 10;
  copies.log_ratios.clear();
  copies.mask.clear();
  for (size_t i = 0; i < 4000; ++i) {
    copies.log_ratios.push_back(one.log_ratios[i / 10]);
    copies.mask.push_back(one.mask[i / 10]);
  }
  EXPECT_NEAR(copies.report({}).standard_error, one.report({}).standard_error, 1e-12);
}

TEST(KlEstimator, NothingAndOneSequence) {
  Gaussians batch(0.5, 1, 9);
  EXPECT_TRUE(std::isnan(batch.report({}).standard_error));
  for (double& weight : batch.mask) weight = 0;
  EXPECT_EQ(batch.report({}).mean, 0);
  EXPECT_EQ(batch.report({}).tokens, 0);
}

TEST(KlEstimator, IsFiniteForAnyFiniteLogRatio) {
  for (const double size : {100.0, 360.0, 599.0, 1e6}) {
    Gaussians batch(0.5, 3, 4);
    for (double& weight : batch.mask) weight = 1;
    for (size_t i = 0; i < 12; ++i) batch.log_ratios[i] = i == 5 ? size : -0.1;
    for (int i = 0; i < 4; ++i) {
      const KlReport out = batch.report({.estimator = static_cast<KlEstimator>(i)});
      EXPECT_TRUE(std::isfinite(out.mean)) << size << " " << i;
      EXPECT_NEAR(out.ess, 1, 1e-9) << size;
    }
    // One token carries the ratios: lambda is next to nothing, and the estimate is k1's to within
    // the covariance that it takes away.
    EXPECT_LT(std::abs(batch.report({.estimator = KlEstimator::k_lambda}).lambda), 1e-30);
  }
}

TEST(KlEstimator, ALogRatioThatIsNotFiniteMakesAllButTheCountsNan) {
  for (const double broken : {double(NAN), infinity, -infinity}) {
    for (const size_t place : {0u, 5u}) {
      Gaussians batch(0.5, 3, 4);
      batch.mask.assign(12, 1);
      batch.log_ratios.assign(12, -0.1);
      batch.log_ratios[place] = broken;
      for (int i = 0; i < 4; ++i) {
        for (const double lambda : {-1.0, 0.5}) {
          const KlEstimator estimator = static_cast<KlEstimator>(i);
          const KlReport out = batch.report({.estimator = estimator, .lambda = lambda});
          for (double each : {out.mean, out.standard_error, out.ratio_excess, out.ess}) {
            EXPECT_TRUE(std::isnan(each)) << broken << " " << i;
          }
          const bool fitted = estimator == KlEstimator::k_lambda && lambda < 0;
          EXPECT_EQ(std::isnan(out.lambda), fitted);
          EXPECT_EQ(out.tokens, 12);
          EXPECT_EQ(out.sequences, 3);
        }
      }
    }
  }
}

// As the log-ratios close in on one value c, lambda* goes to e^-c.
TEST(KlEstimator, LambdaIsFittedHoweverLittleTheRatiosVary) {
  for (const double centre : {1.0, 3.0}) {
    for (const double spread : {1e-4, 1e-6, 1e-7}) {
      Gaussians batch(0, 10, 100);
      std::mt19937_64 random(5);
      std::normal_distribution<double> normal;
      for (double& d : batch.log_ratios) d = centre + spread * normal(random);
      const double lambda = batch.report({.estimator = KlEstimator::k_lambda}).lambda;
      EXPECT_NEAR(lambda, std::exp(-centre), 4 * spread + 1e-15 / spread) << centre << spread;
    }
  }
}

// One token carries all of the ratios, wherever they are.
TEST(KlEstimator, TheEffectiveSampleSizeIsThatOfTheRatiosWhateverTheirSize) {
  for (const double d : {-400.0, 0.0, 300.0}) {
    Gaussians batch(0, 1, 4);
    batch.mask.assign(4, 1);
    batch.log_ratios = {d, d - 40, d - 50, d - 60};
    EXPECT_NEAR(batch.report({}).ess, 1, 1e-15) << d;
    batch.log_ratios.assign(4, d);
    EXPECT_NEAR(batch.report({}).ess, 4, 1e-14) << d;
  }
}

TEST(KlEstimator, BadInputGetsOneClearError) {
  Gaussians batch(0.5, 1, 3);
  EXPECT_EQ(message([&] { kl_report({{.rows = 1, .columns = 3}, {}, batch.view(batch.mask)}); }),
            "kl_report: log_ratios must be given, got none");
  EXPECT_EQ(message([&] { batch.report({KlEstimator::k_lambda, std::nan("")}); }),
            "kl_report: lambda must be in [-1, 1e+12], got nan");
  batch.mask[1] = 1.5;
  EXPECT_EQ(message([&] { batch.report({}); }),
            "kl_report: response_mask must be in [0, 1], got 1.5 at [0, 1]");
}

}  // namespace
}  // namespace tether
