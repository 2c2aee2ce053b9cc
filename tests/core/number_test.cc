#include "core/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Dual<double> at(double value) { return {value, 1}; }

TEST(Dual, ArithmeticFollowsTheProductAndQuotientRules) {
  const Dual<double> x = at(3);
  const Dual<double> y = x * x / (x + 1.0) - 2.0 * x + 5.0 / x;
  EXPECT_DOUBLE_EQ(y.value, 9.0 / 4 - 6 + 5.0 / 3);
  EXPECT_DOUBLE_EQ(y.grad, (6.0 * 4 - 9) / 16 - 2 - 5.0 / 9);
}

TEST(Dual, ConstantsHaveNoDerivative) {
  const Constant<double> a{4};
  static_assert(sizeof(Constant<float>) == sizeof(float));
  static_assert(std::is_same_v<decltype(a * a), Constant<double>>);
  const Dual<double> y = a * at(3) - a / at(2);
  EXPECT_DOUBLE_EQ(y.value, 10);
  EXPECT_DOUBLE_EQ(y.grad, 4 + 1);
}

TEST(Dual, SeveralDerivativesAtOnce) {
  const Dual<double, 2> x{2, {{1, 0}}}, y{5, {{0, 1}}};
  const Dual<double, 2> z = exp(x * y - 10.0) * y + Constant<double>{1};
  EXPECT_DOUBLE_EQ(z.value, 6);
  EXPECT_DOUBLE_EQ(z.grad[0], 25);  // y * y
  EXPECT_DOUBLE_EQ(z.grad[1], 11);  // 1 + x * y
}

TEST(Dual, TiesTakeTheFirst) {
  const Dual<double> a{2, 10}, b{2, 20};
  EXPECT_EQ(min(a, b).grad, 10);
  EXPECT_EQ(max(a, b).grad, 10);
  EXPECT_EQ(min(b, a).grad, 20);
  EXPECT_EQ(max(b, a).grad, 20);
}

TEST(Dual, ClampPassesTheGradientOnTheClosedInterval) {
  struct Row {
    double x, value, grad;
  };
  for (const Row& row :
       {Row{-1, 1, 0}, Row{1, 1, 1}, Row{1.5, 1.5, 1}, Row{2, 2, 1}, Row{3, 2, 0}}) {
    EXPECT_EQ(clamp(at(row.x), 1, 2).value, row.value) << row.x;
    EXPECT_EQ(clamp(at(row.x), 1, 2).grad, row.grad) << row.x;
  }
}

TEST(Dual, AbsHasNoDerivativeAtZero) {
  EXPECT_EQ(abs(at(-3)).value, 3);
  EXPECT_EQ(abs(at(-3)).grad, -1);
  EXPECT_EQ(abs(at(3)).grad, 1);
  EXPECT_EQ(abs(at(0)).grad, 0);
}

TEST(Dual, NaNComesThrough) {
  for (const auto& y : {min(at(kNaN), at(1)), min(at(1), at(kNaN)), max(at(kNaN), at(1)),
                        max(at(1), at(kNaN)), clamp(at(kNaN), 0, 1), exp(at(kNaN)), expm1(at(kNaN)),
                        expm1_minus(at(kNaN)), log_sigmoid(at(kNaN)), abs(at(kNaN))}) {
    EXPECT_TRUE(std::isnan(y.value));
  }
}

TEST(Dual, SelectDoesNotLookAtTheOtherBranch) {
  const Dual<double> bad{kNaN, kNaN}, good{1, 2};
  EXPECT_EQ(select(true, good, bad).value, 1);
  EXPECT_EQ(select(false, bad, good).grad, 2);
  EXPECT_EQ(select(true, Constant<double>{7}, bad).grad, 0);
}

TEST(Dual, ExpSaturatesAndStillPulls) {
  EXPECT_EQ(exp(at(1000)).value, exp(at(600)).value);
  EXPECT_EQ(exp(at(1000)).grad, exp(at(600)).value);
  EXPECT_EQ(exp(at(kInf)).grad, exp(at(600)).value);
  EXPECT_GT(exp(at(-1e300)).value, 0);
  const Dual<float> runaway = exp(Dual<float>{3e38f, 1.0f});
  EXPECT_TRUE(std::isfinite(runaway.value * 1e12f));
  EXPECT_FLOAT_EQ(runaway.value, std::exp(60.0f));
  EXPECT_EQ(runaway.grad, runaway.value);
}

TEST(Dual, Expm1MinusIsNeverNegativeAndSaturatesAbove) {
  for (float d :
       {-3e38f, -60.0f, -1.0f, -1e-4f, -1e-30f, 0.0f, 1e-30f, 1e-4f, 0.3f, 60.0f, 3e38f}) {
    const Dual<float> k3 = expm1_minus(Dual<float>{d, 1.0f});
    EXPECT_GE(k3.value, 0) << d;
    EXPECT_TRUE(std::isfinite(k3.value)) << d;
    EXPECT_TRUE(std::isfinite(k3.grad)) << d;
  }
  EXPECT_EQ(expm1_minus(at(1e9)).grad, std::expm1(600));
  EXPECT_DOUBLE_EQ(expm1_minus(at(-1e9)).value, 1e9 - 1);
}

TEST(Dual, FunctionsHaveTheirDerivatives) {
  const double h = 1e-6;
  const auto check = [&](auto f, double x) {
    const double numeric = (f(at(x + h)).value - f(at(x - h)).value) / (2 * h);
    EXPECT_NEAR(f(at(x)).grad, numeric, 1e-8 * (1 + std::abs(numeric))) << x;
  };
  for (double x : {-7.0, -1.3, -0.2, -0.05}) {
    check([](auto n) { return log1mexp(n); }, x);
  }
  for (double x : {-7.0, -1.3, -0.2, -0.05}) {
    check([](auto n) { return chances(n).own; }, x);
    check([](auto n) { return chances(n).others; }, x);
  }
  for (double x : {0.05, 0.4, 1.0, 9.0}) {
    check([](auto n) { return log(n); }, x);
    check([](auto n) { return log_quotient(n, Dual<double>{2, 0}); }, x);
    check([](auto n) { return log_quotient(Dual<double>{2, 0}, n); }, x);
  }
  for (double x : {-0.7, -1e-3, 0.0, 0.4, 5.0}) {
    check([](auto n) { return log1p(n); }, x);
  }
  for (double x : {-9.0, -0.7, -1e-3, 0.0, 0.4, 5.0}) {
    check([](auto n) { return exp(n); }, x);
    check([](auto n) { return expm1(n); }, x);
    check([](auto n) { return expm1_minus(n); }, x);
    check([](auto n) { return sigmoid(n); }, x);
    check([](auto n) { return log_sigmoid(n); }, x);
  }
}

TEST(Dual, StraightThroughTakesValueAndGradientFromDifferentNumbers) {
  const Dual<double> y = with_gradient_of(stop_gradient(at(5)) * 2.0, Dual<double>{1, 7});
  EXPECT_EQ(y.value, 10);
  EXPECT_EQ(y.grad, 7);
}

}  // namespace
}  // namespace tether
