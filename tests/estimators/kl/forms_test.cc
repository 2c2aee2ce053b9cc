#include "estimators/kl/forms.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "estimators/kl/exact.h"

namespace tether {
namespace {

const nlohmann::json& pointwise() {
  static const auto json =
      nlohmann::json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/kl_golden.json"));
  return json["pointwise"];
}

template <class T>
Dual<T> at(double d) {
  return {static_cast<T>(d), T(1)};
}

// In units of the last place of `expected`, for T.
template <class T>
double ulps(T value, double expected) {
  if (double(value) == expected) return 0;
  const T rounded = T(std::abs(expected));
  return std::abs(double(value) - expected) /
         double(std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded);
}

template <class T>
void expect_golden(const nlohmann::json& rows) {
  ASSERT_GE(rows.size(), 10u);
  for (const auto& row : rows) {
    const double d = row["d"];
    if (std::abs(d) > double(kSaturation<T>)) continue;  // saturated: not the function itself
    const Dual<T> x = at<T>(d);
    EXPECT_LE(ulps(k1(x).value, row["k1"]), 0) << d;
    EXPECT_LE(ulps(k2(x).value, row["k2"]), 2) << d;
    EXPECT_LE(ulps(k3(x).value, row["k3"]), 2) << d;
    EXPECT_LE(ulps(k1(x).grad, row["dk1_dd"]), 0) << d;
    EXPECT_LE(ulps(k2(x).grad, row["dk2_dd"]), 2) << d;
    EXPECT_LE(ulps(k3(x).grad, row["dk3_dd"]), 2) << d;
  }
}

TEST(KlEstimators, MatchTheGoldenValuesInDouble) { expect_golden<double>(pointwise()["f64"]); }
TEST(KlEstimators, MatchTheGoldenValuesInFloat) { expect_golden<float>(pointwise()["f32"]); }

// q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2): KL(q || p) = log(2) / 4.
TEST(KlEstimators, K1AndK3AreUnbiasedByEnumeration) {
  const double q[] = {0.5, 0.25, 0.25}, p[] = {0.25, 0.25, 0.5};
  double mean_k1 = 0, mean_k2 = 0, mean_k3 = 0;
  for (int i = 0; i < 3; ++i) {
    const Dual<double> d = at<double>(std::log(p[i] / q[i]));
    mean_k1 += q[i] * k1(d).value;
    mean_k2 += q[i] * k2(d).value;
    mean_k3 += q[i] * k3(d).value;
  }
  EXPECT_NEAR(mean_k1, std::log(2) / 4, 1e-15);
  EXPECT_NEAR(mean_k3, std::log(2) / 4, 1e-15);
  EXPECT_NEAR(mean_k2, 0.375 * std::log(2) * std::log(2), 1e-15);  // biased, and by how much
}

// d log_ratio / d logp of the sampled policy is -1: k1 pulls nowhere, k2 as KL(sampled || other),
// k3 as KL(other || sampled). Gradients in the logits of q are q_i (c_i - mean c), c = -d k / d
// logp ... .
TEST(KlEstimators, ExpectedGradientsAreOfTheLabelledDivergences) {
  const double q[] = {0.5, 0.3, 0.2}, p[] = {0.2, 0.3, 0.5};
  double kl_qp = 0;
  for (int i = 0; i < 3; ++i) kl_qp += q[i] * std::log(q[i] / p[i]);
  double c1[3], c2[3], c3[3], mean1 = 0, mean2 = 0, mean3 = 0;
  for (int i = 0; i < 3; ++i) {
    const Dual<double> d{std::log(p[i] / q[i]), -1};  // derivative with respect to log q(i)
    c1[i] = k1(d).grad;
    c2[i] = k2(d).grad;
    c3[i] = k3(d).grad;
    mean1 += q[i] * c1[i];
    mean2 += q[i] * c2[i];
    mean3 += q[i] * c3[i];
  }
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(q[i] * (c1[i] - mean1), 0, 1e-15);
    EXPECT_NEAR(q[i] * (c2[i] - mean2), q[i] * (std::log(q[i] / p[i]) - kl_qp), 1e-15);
    EXPECT_NEAR(q[i] * (c3[i] - mean3), q[i] - p[i], 1e-15);
  }
}

TEST(ExactKl, AnyMixtureOfNumbersAndConstants) {
  using D = Dual<double, 2>;
  const auto variable = [](double value, int i) {
    D out(value);
    (i == 0 ? out.grad[0] : out.grad[1]) = 1;
    return out;
  };
  const D all = gaussian_kl(variable(0.3, 0), variable(-0.2, 1), D(0.7), D(0.4));
  const D some = gaussian_kl(variable(0.3, 0), variable(-0.2, 1), 0.7, Constant<double>{0.4});
  EXPECT_EQ(some.value, all.value);
  EXPECT_EQ(some.grad[0], all.grad[0]);
  EXPECT_EQ(some.grad[1], all.grad[1]);
  const double plain = gaussian_kl(0.3, -0.2, 0.7, 0.4);
  EXPECT_EQ(plain, all.value);
  const double step = 1e-6;
  const double slope =
      gaussian_kl(0.3 + step, -0.2, 0.7, 0.4) - gaussian_kl(0.3 - step, -0.2, 0.7, 0.4);
  EXPECT_NEAR(some.grad[0], slope / (2 * step), 1e-9);

  const D bernoulli = bernoulli_kl(variable(0.8, 0), -0.5);
  EXPECT_EQ(bernoulli.value, bernoulli_kl(0.8, -0.5));
  EXPECT_NEAR(bernoulli.grad[0],
              (bernoulli_kl(0.8 + step, -0.5) - bernoulli_kl(0.8 - step, -0.5)) / (2 * step), 1e-9);
  EXPECT_EQ(bernoulli.grad[1], 0);
}

}  // namespace
}  // namespace tether
