#include "estimators/advantage/vtrace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "estimators/advantage/gae.h"
#include "estimators/advantage/returns.h"
#include "estimators/advantage/row_scan.h"

namespace tether {
namespace {

using testing::DoubleNear;
using testing::Pointwise;
using Doubles = std::vector<double>;

// One row without a gap.
struct Row {
  Doubles rewards, values, log_ratios;
  double bootstrap = 0;
  Doubles advantages = rewards, returns = rewards;

  void run(const Recursion& recursion) {
    const auto n = static_cast<int64_t>(rewards.size());
    const Doubles ones(rewards.size(), 1);
    const auto array = [&](const Doubles& data) {
      return ConstArray{data.data(), DType::float64, n, 1};
    };
    scan_rows("advantage",
              {.layout = {.rows = 1, .columns = n},
               .rewards = array(rewards),
               .values = array(values),
               .response_mask = array(ones),
               .bootstrap = {&bootstrap, DType::float64, 1, 0, true},
               .log_ratios = array(log_ratios)},
              recursion, {advantages.data(), DType::float64, n, 1},
              {returns.data(), DType::float64, n, 1});
  }
};

auto near(Doubles expected) { return Pointwise(DoubleNear(1e-14), std::move(expected)); }

TEST(Vtrace, MatchesTheRecursionByHand) {
  // Ratios 2, 1/2, 1; rho = c = 1, 1/2, 1. v_2 = 0.1 + 0.9 = 1;
  // v_1 = 0.2 + 0.5 (0.1 - 0.2) + 0.5 (1 - 0.1) = 0.6; v_0 = 0.5 + (0.2 - 0.5) + (0.6 - 0.2) = 0.6.
  // A = 1 (0.6 - 0.5), 0.5 (1 - 0.2), 1 (1 - 0.1).
  Row row{{0, 0, 1}, {0.5, 0.2, 0.1}, {std::log(2), -std::log(2), 0}};
  row.run(Vtrace{});
  EXPECT_THAT(row.returns, near({0.6, 0.6, 1}));
  EXPECT_THAT(row.advantages, near({0.1, 0.4, 0.9}));
  // Without bars but c_bar 1: v_0 = 0.5 + 2 (0.2 - 0.5) + 1 (0.6 - 0.2) = 0.3; A_0 = 2 (0.6 - 0.5).
  row.run(Vtrace{.rho_bar = infinity, .pg_rho_bar = infinity});
  EXPECT_THAT(row.returns, near({0.3, 0.6, 1}));
  EXPECT_THAT(row.advantages, near({0.2, 0.4, 0.9}));
}

Row random_row(unsigned seed, size_t size) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Row out;
  for (Doubles* each : {&out.rewards, &out.values, &out.log_ratios}) {
    for (size_t i = 0; i < size; ++i) each->push_back(normal(random));
  }
  out.bootstrap = normal(random);
  out.advantages = out.returns = out.rewards;
  return out;
}

// Eq. 1 as the sum that it is: v_s = V_s + sum_t gamma^(t-s) (prod_{i=s}^{t-1} c_i) delta_t.
TEST(Vtrace, IsTheSumOfThePaper) {
  const Vtrace options{
      .gamma = 0.95, .lambda = 0.9, .rho_bar = 1.2, .c_bar = 0.8, .pg_rho_bar = 1.5};
  Row row = random_row(1, 300);
  row.run(options);
  const size_t n = row.rewards.size();
  const auto ratio = [&](size_t t, double bar) {
    return std::min(std::exp(row.log_ratios[t]), bar);
  };
  const auto value = [&](size_t t) { return t < n ? row.values[t] : row.bootstrap; };
  for (size_t s = 0; s < n; ++s) {
    double v = row.values[s], weight = 1;
    for (size_t t = s; t < n; ++t) {
      const double delta = row.rewards[t] + options.gamma * value(t + 1) - value(t);
      v += weight * ratio(t, options.rho_bar) * delta;
      weight *= options.gamma * options.lambda * ratio(t, options.c_bar);
    }
    EXPECT_NEAR(row.returns[s], v, 1e-12) << s;
  }
  for (size_t s = 0; s < n; ++s) {
    const double v = s + 1 < n ? row.returns[s + 1] : row.bootstrap;
    const double q = value(s + 1) + options.lambda * (v - value(s + 1));
    const double advantage = row.rewards[s] + options.gamma * q - value(s);
    EXPECT_NEAR(row.advantages[s], ratio(s, options.pg_rho_bar) * advantage, 1e-12) << s;
  }
}

TEST(Vtrace, OnPolicyItIsGaeWithLambda) {
  Row row = random_row(2, 70);
  std::fill(row.log_ratios.begin(), row.log_ratios.end(), 0.0);
  Row gae = row;
  row.run(Vtrace{.gamma = 0.9, .lambda = 0.8});
  gae.run(Gae{.gamma = 0.9, .lambda = 0.8});
  EXPECT_THAT(row.returns, near(gae.returns));
  EXPECT_THAT(row.advantages, near(gae.advantages));
  gae.run(DiscountedReturns{.gamma = 0.9});
  row.run(Vtrace{.gamma = 0.9});
  EXPECT_THAT(row.returns, near(gae.returns));
}

TEST(Vtrace, WithoutRatiosNothingIsLearnt) {
  Row row = random_row(3, 70);
  row.run(Vtrace{.rho_bar = 0, .pg_rho_bar = 0});
  EXPECT_EQ(row.returns, row.values);
  EXPECT_THAT(row.advantages, testing::Each(0.0));
}

TEST(Vtrace, IsFiniteForAnyLogRatio) {
  for (const double far : {-1e300, -800.0, 800.0, 1e300}) {
    Row row = random_row(4, 40);
    row.log_ratios[20] = far;
    row.run(Vtrace{.rho_bar = infinity, .c_bar = 1, .pg_rho_bar = infinity});
    for (const double each : row.advantages) EXPECT_TRUE(std::isfinite(each)) << far;
    for (const double each : row.returns) EXPECT_TRUE(std::isfinite(each)) << far;
  }
}

}  // namespace
}  // namespace tether
