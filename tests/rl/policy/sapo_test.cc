#include "rl/policy/sapo.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

// With tau = 2 the gate at ratio 1 + log(3) / 2 is sigmoid(log 3) = 3/4, at 1 - log(3) / 2 it is
// 1/4; with tau = 4 at half that distance. g (1 - g) is 3/16.
TEST(SoftGate, FadesOnBothSidesWithTheTauOfTheAdvantage) {
  const SoftGate gate{.tau_pos = 2, .tau_neg = 4};
  const double far = std::log(3) / 2, near = std::log(3) / 4;
  struct Row {
    double ratio, advantage, value, grad;
  };
  for (const Row& row :
       {Row{1 + far, +2, -3, -1.5 * (1 + far)}, Row{1 - far, +2, -1, -1.5 * (1 - far)},
        Row{1 + near, -2, 1.5, 1.5 * (1 + near)}, Row{1 - near, -2, 0.5, 1.5 * (1 - near)},
        Row{1, +2, -2, -2}, Row{1, -2, 1, 2}}) {
    const auto loss = gate(token_at(row.ratio, row.advantage));
    EXPECT_NEAR(loss.value, row.value, 1e-15) << "ratio " << row.ratio << ", A " << row.advantage;
    EXPECT_NEAR(loss.grad, row.grad, 1e-15) << "ratio " << row.ratio << ", A " << row.advantage;
  }
}

TEST(SoftGate, WithoutAnAdvantageThereIsNothing) {
  EXPECT_EQ(SoftGate{}(token_at(3, 0)).value, 0);
  EXPECT_EQ(SoftGate{}(token_at(3, 0)).grad, 0);
}

// At ratio 1 the gradient is -A whatever tau is; far away it underflows to 0 and never to NaN.
TEST(SoftGate, HasNoNanAtAnyRatio) {
  for (double tau : {1e-6, 1.0, 1e6}) {
    const SoftGate gate{.tau_pos = tau, .tau_neg = tau};
    EXPECT_NEAR(gate(token_at(1, 3)).grad, -3, 1e-15) << tau;
    for (double ratio : {1e-200, 1e200}) {
      for (double advantage : {-1e40, 1e40}) {
        const auto loss = gate(token_at(ratio, advantage));
        EXPECT_TRUE(std::isfinite(loss.value) && std::isfinite(loss.grad)) << tau << " " << ratio;
      }
    }
  }
}

TEST(SoftGate, DefaultsAreThePapers) {
  EXPECT_EQ(SoftGate{}.tau_pos, 1);
  EXPECT_EQ(SoftGate{}.tau_neg, 1.05);
}

// Each answer's mean, then theirs: the factors are 1/6 and 1/2. Slopes of tokens by the hand cases'
// formula, 4 g (1 - g) ratio A.
TEST(Sapo, IsTheMeanOverAnswers) {
  Batch<double> batch = two_answers();
  const SoftGate gate{.tau_pos = 2, .tau_neg = 4};
  const auto g = [](double tau, double ratio) { return 1 / (1 + std::exp(-tau * (ratio - 1))); };
  const auto slope = [&](double tau, double ratio, double A) {
    return -4 * g(tau, ratio) * (1 - g(tau, ratio)) * ratio * A;
  };
  const double first = -2 * 2 * (g(2, 1.1) + g(2, 1.5) + g(2, 0.5)) / 3, second = 2 * g(4, 0.5);
  expect_loss_and_slopes(batch, presets::sapo(gate), (first + second) / 2,
                         {slope(2, 1.1, 2) / 6, slope(2, 1.5, 2) / 6, slope(2, 0.5, 2) / 6,
                          slope(4, 0.5, -2) / 2, 0, 0});
}

}  // namespace
}  // namespace tether
