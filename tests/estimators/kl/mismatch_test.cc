#include "estimators/kl/mismatch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace tether {
namespace {

MismatchReport report_of(const std::vector<double>& old_logps,
                         const std::vector<double>& rollout_logps, const std::vector<double>& mask,
                         int64_t rows) {
  const int64_t columns = int64_t(mask.size()) / rows;
  const auto view = [&](const std::vector<double>& array) {
    return ConstArray{array.data(), DType::float64, columns, 1};
  };
  return mismatch_report({.layout = {.rows = rows, .columns = columns},
                          .old_logps = view(old_logps),
                          .rollout_logps = view(rollout_logps),
                          .response_mask = view(mask)});
}

// Two answers: ratios 2 and 1/2 in one, 4 in the other.
TEST(MismatchReport, IsItsDefinition) {
  const double a = std::log(0.5), b = std::log(0.25), c = std::log(0.125), nan = double(NAN);
  const MismatchReport out =
      report_of({a, b, c, nan}, {b, a, c - std::log(4), nan}, {1, 1, 1, 0}, 2);
  EXPECT_EQ(out.tokens, 3);
  EXPECT_EQ(out.sequences, 2);
  EXPECT_NEAR(out.k1, -std::log(4) / 3, 1e-15);
  EXPECT_NEAR(out.k3, (6.5 - 3 - std::log(4)) / 3, 1e-15);
  EXPECT_NEAR(out.perplexity, (std::sqrt(8) + 8) / 2, 1e-14);
  EXPECT_NEAR(out.rollout_perplexity, (std::sqrt(8) + 32) / 2, 1e-14);
  EXPECT_NEAR(out.probability_gap, (0.25 + 0.25 + 0.09375) / 3, 1e-15);
  EXPECT_NEAR(out.probability_gap_max, 0.25, 1e-15);
  EXPECT_NEAR(out.token.mean, 6.5 / 3, 1e-14);
  EXPECT_NEAR(out.token.min, 0.5, 1e-15);
  EXPECT_NEAR(out.token.max, 4, 1e-14);
  EXPECT_NEAR(out.token.chi2, 20.25 / 3 - 1, 1e-13);
  EXPECT_NEAR(out.token.ess, 6.5 * 6.5 / (3 * 20.25), 1e-14);
  EXPECT_NEAR(out.sequence_mean.mean, 2.5, 1e-14);  // 1 and 4
  EXPECT_NEAR(out.sequence_sum.chi2, 7.5, 1e-13);
  EXPECT_NEAR(out.sequence_sum.ess, 25.0 / 34, 1e-14);
}

TEST(MismatchReport, CountsATokenByItsWeight) {
  const double l2 = std::log(2);
  const MismatchReport out = report_of({-1, -1}, {-1 - l2, -1}, {0.5, 1}, 1);
  EXPECT_EQ(out.tokens, 1.5);
  EXPECT_NEAR(out.token.mean, 2 / 1.5, 1e-15);
  EXPECT_NEAR(out.k1, -0.5 * l2 / 1.5, 1e-15);
  EXPECT_NEAR(out.sequence_sum.mean, std::sqrt(2), 1e-15);
  EXPECT_NEAR(out.sequence_mean.mean, std::exp(0.5 * l2 / 1.5), 1e-15);
}

TEST(MismatchReport, OfNothingIsZeros) {
  const MismatchReport out = report_of({NAN}, {NAN}, {0}, 1);
  EXPECT_EQ(out.tokens, 0);
  EXPECT_EQ(out.token.ess, 0);
  EXPECT_EQ(out.sequence_sum.max, 0);
}

// One token of two that the trainer all but excludes: alignment is off by one, say.
TEST(MismatchReport, AFarGapCountsWholeInK1) {
  const MismatchReport out = report_of({-1, -10000}, {-1, -1}, {1, 1}, 1);
  EXPECT_EQ(out.k1, 9999 / 2.0);
  EXPECT_EQ(out.token.min, std::exp(-300));
}

// Ratios 1 : 1/2 : 1/4 of whole answers, however far all of them are.
TEST(MismatchReport, TheEffectiveShareKnowsNoScale) {
  for (const double far : {-2000.0, -400.0, 0.0, 400.0, 2000.0}) {
    const double l2 = std::log(2);
    const MismatchReport out =
        report_of({-1, -1, -1}, {-1 - far, -1 - far + l2, -1 - far + 2 * l2}, {1, 1, 1}, 3);
    const double share = 1.75 * 1.75 / (3 * 1.3125);
    EXPECT_NEAR(out.token.ess, share, 1e-12) << far;
    EXPECT_NEAR(out.sequence_sum.ess, share, 1e-12) << far;
  }
}

TEST(MismatchReport, StaysFiniteForHugeNumbersAndHidesNothingElse) {
  const MismatchReport far = report_of({-1, -1e308}, {-1e308, -1}, {1, 1}, 2);
  EXPECT_TRUE(std::isfinite(far.token.chi2) && std::isfinite(far.sequence_sum.ess));
  EXPECT_NEAR(far.k3 - far.k1, far.token.mean - 1, 1e-10 * far.token.mean);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double broken : {double(NAN), -kInfinity}) {
    const MismatchReport out = report_of({-1, -1}, {-1, broken}, {1, 1}, 2);
    for (const double each :
         {out.k1, out.k3, out.probability_gap, out.probability_gap_max, out.token.mean,
          out.token.max, out.token.ess, out.sequence_sum.min, out.rollout_perplexity}) {
      EXPECT_TRUE(std::isnan(each)) << broken;
    }
  }
}

}  // namespace
}  // namespace tether
