#include "bench/estimator_variance.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace tether::bench {
namespace {

constexpr int64_t kSamples = 200'000;
constexpr double kSigmas = 5;

TEST(EstimatorVariance, ExactValuesAreThoseOfTheGoldens) {
  std::ifstream file(TETHER_TESTS_DIR "/golden/kl_golden.json");
  const auto golden = nlohmann::json::parse(file);
  int seen = 0;
  for (const auto& pair : golden.at("gaussian")) {
    if (pair.at("sigma_q") != 1.0 || pair.at("sigma_p") != 1.0 || pair.at("mu_q") != 0.0) continue;
    const double shift = pair.at("mu_p");
    if (shift < 0.01) continue;
    const auto truth = exact(shift);
    const double kl = pair.at("kl_qp");
    EXPECT_NEAR(exact_kl(shift) / kl, 1, 1e-14);
    for (size_t i = 0; i < 3; ++i) {
      const auto& want = pair.at(std::string(kEstimators[i]));
      EXPECT_NEAR(truth[i].bias, want.at("bias_over_kl"), 1e-12);
      EXPECT_NEAR(truth[i].std / want.at("std_over_kl").get<double>(), 1, 1e-12);
    }
    EXPECT_NEAR(best_lambda(shift) / pair.at("lambda_star").get<double>(), 1, 1e-12);
    const double variance = pair.at("var_k_lambda_star");
    EXPECT_NEAR(truth[3].std * kl / std::sqrt(variance), 1, 1e-9);
    ++seen;
  }
  EXPECT_GE(seen, 4);
}

TEST(EstimatorVariance, ExactValuesLieInTheIntervals) {
  for (double shift : {0.1, 0.5, 1.0}) {
    const auto measured = measure(shift, kSamples, 7);
    const auto truth = exact(shift);
    for (size_t i = 0; i < kEstimators.size(); ++i) {
      const Measured& m = measured[i];
      EXPECT_LE(std::abs(m.value.bias - truth[i].bias), kSigmas * m.error.bias)
          << shift << " " << kEstimators[i];
      EXPECT_LE(std::abs(m.value.std - truth[i].std), kSigmas * m.error.std)
          << shift << " " << kEstimators[i];
    }
  }
}

// The test above can fail: k2 is not without bias, and no two estimators have the same spread.
TEST(EstimatorVariance, OtherEstimatorsLieOutside) {
  const auto measured = measure(1, kSamples, 7);
  const auto truth = exact(1);
  EXPECT_GT(std::abs(measured[1].value.bias - truth[0].bias), kSigmas * measured[1].error.bias);
  for (size_t i = 0; i < kEstimators.size(); ++i) {
    for (size_t k = 0; k < kEstimators.size(); ++k) {
      if (i == k || i + k == 3) continue;
      EXPECT_GT(std::abs(measured[i].value.std - truth[k].std), kSigmas * measured[i].error.std)
          << kEstimators[i] << " as " << kEstimators[k];
    }
  }
}

TEST(EstimatorVariance, SameSeedSameFigures) {
  const auto first = measure(0.5, 1000, 3), again = measure(0.5, 1000, 3);
  const auto other = measure(0.5, 1000, 4);
  EXPECT_EQ(first[2].value.std, again[2].value.std);
  EXPECT_NE(first[2].value.std, other[2].value.std);
}

}  // namespace
}  // namespace tether::bench
