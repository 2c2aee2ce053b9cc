#include "rl/kl_penalty.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "rl/kernels/policy_checks.h"
#include "rl/policy/ppo.h"
#include "tests/rl/policy_batch.h"

namespace tether {
namespace {

PolicyObjective penalty_alone(const KlForm& estimator, KlCorrection correction) {
  PolicyObjective objective = presets::ppo();
  objective.kl = {.beta = 1,
                  .estimator = estimator,
                  .gradient = estimator,
                  .correction = correction,
                  .allow_biased_gradient = true};
  return objective;
}

// One token with old = policy, no advantage and a reference d above the policy: all of the gradient
// is that of rho K(d) with rho = 1.
template <class T>
T gradient_at(double d, PolicyObjective objective, RatioLevel level) {
  Batch<T> batch(1, 1);
  batch.logps = batch.old_logps = {T(-0.125 - d)};
  batch.ref_logps = {T(-0.125)};
  batch.mask = {T(1)};
  objective.level = level;
  batch.run(objective);
  return batch.dlogps[0];
}

// d/dlogp [rho k3(d)] = rho (e^d - 1 - d) + rho (1 - e^d) = -rho d, where the sum has no digit left
// from d = 17 in float and from d = 37 in double.
template <class T>
void expect_minus_d() {
  const PolicyObjective token = penalty_alone(K3{}, KlCorrection::ratio);
  const PolicyObjective level = penalty_alone(K3{}, KlCorrection::level_ratio);
  for (const double d : {0.25, 20.0, 25.0, 45.0, 100.0}) {
    EXPECT_EQ(gradient_at<T>(d, token, RatioLevel::token), T(-d)) << d;
    for (const RatioLevel each : {RatioLevel::token, RatioLevel::sequence_mean,
                                  RatioLevel::sequence_token, RatioLevel::sequence_sum}) {
      EXPECT_EQ(gradient_at<T>(d, level, each), T(-d))
          << d << " " << kRatioLevelNames[static_cast<size_t>(each)];
    }
  }
}
TEST(KlPenalty, TheGradientOfK3UnderARatioIsMinusDInFloat) { expect_minus_d<float>(); }
TEST(KlPenalty, TheGradientOfK3UnderARatioIsMinusDInDouble) { expect_minus_d<double>(); }

// A weight of the only token of a segment weighs its penalty, and by a mean does no more.
template <class T>
void expect_alone(double d, T weight) {
  Batch<T> batch(1, 1);
  batch.ref_logps = {T(d)};
  batch.mask = {weight};
  PolicyObjective objective = penalty_alone(K3{}, KlCorrection::level_ratio);
  objective.aggregation = token_sum();
  for (const RatioLevel level : {RatioLevel::sequence_mean, RatioLevel::turn_mean}) {
    objective.level = level;
    batch.run(objective);
    EXPECT_EQ(batch.dlogps[0], weight * T(-d)) << d << " " << weight;
  }
}
TEST(KlPenalty, OfATokenThatIsAloneUnderAWeight) {
  for (const double d : {40.0, 60.0, 90.0}) {
    for (const double weight : {0.7, 0.49, 1.0 / 3}) {
      expect_alone<float>(d, float(weight));
      expect_alone<double>(d, weight);
    }
  }
}

// TRL weighs the penalty of GSPO by the sequence's ratio: rho_i = exp(mean log-ratio), in the
// graph.
//   logp - old = (0.2, 0.4): rho = e^0.3.   d = (0.5, -0.5), k2 = (1/8, 1/8)
//   d/dlogp_t [rho (k2_1 + k2_2) / 2] = rho (-d_t + (k2_1 + k2_2) / 2) / 2
TEST(KlPenalty, TheRatioOfASequenceHasItsGradientAtEveryToken) {
  Batch<double> batch(1, 2);
  batch.logps = {-1, -2};
  batch.old_logps = {-1.2, -2.4};
  batch.ref_logps = {-0.5, -2.5};
  batch.mask = {1, 1};
  PolicyObjective objective = penalty_alone(K2{}, KlCorrection::level_ratio);
  objective.level = RatioLevel::sequence_mean;
  const double rho = std::exp(0.3);
  EXPECT_NEAR(batch.run(objective).loss, rho / 8, 1e-15);
  EXPECT_NEAR(batch.dlogps[0], rho * (-0.5 + 0.125) / 2, 1e-15);
  EXPECT_NEAR(batch.dlogps[1], rho * (0.5 + 0.125) / 2, 1e-15);

  objective.kl.correction = KlCorrection::detached_level_ratio;
  EXPECT_NEAR(batch.run(objective).loss, rho / 8, 1e-15);
  EXPECT_NEAR(batch.dlogps[0], rho * -0.5 / 2, 1e-15);

  objective.kl.correction = KlCorrection::detached_ratio;  // each token's own
  EXPECT_NEAR(batch.run(objective).loss, (std::exp(0.2) + std::exp(0.4)) / 16, 1e-15);
}

// d/dlogp_t [exp(L) sum_s k3(d_s)] with L the row's sum of log-ratios, here 0: -d_t + sum of the
// others' k3, which total - own would lose beside e^25 or e^45.
template <class T>
void expect_others(double d0, double d1, double relative) {
  Batch<T> batch(1, 2);
  batch.ref_logps = {T(d0), T(d1)};
  batch.mask = {T(1), T(1)};
  PolicyObjective objective = penalty_alone(K3{}, KlCorrection::level_ratio);
  objective.level = RatioLevel::sequence_sum;
  objective.aggregation = token_sum();
  batch.run(objective);
  const auto k3_of = [](double d) { return std::expm1(d) - d; };
  const double first = -d0 + k3_of(d1), second = -d1 + k3_of(d0);
  EXPECT_NEAR(batch.dlogps[0], first, relative * std::abs(first)) << d0 << " " << d1;
  EXPECT_NEAR(batch.dlogps[1], second, relative * std::abs(second)) << d0 << " " << d1;
}
TEST(KlPenalty, WhatOtherTokensGiveByWayOfARatioDoesNotDrownInATokensOwn) {
  for (const double d : {20.0, 25.0, 45.0}) {
    expect_others<float>(d, 5, 1e-6);
    expect_others<double>(d, 5, 1e-13);
    expect_others<double>(d, 3, 1e-13);
  }
}

TEST(KlPenalty, AnInfiniteReferenceSpoilsAllThatItsRowShares) {
  for (const KlCorrection correction : {KlCorrection::none, KlCorrection::level_ratio}) {
    for (const RatioLevel level : {RatioLevel::sequence_mean, RatioLevel::sequence_sum}) {
      Batch<float> batch(2, 3);
      batch.mask.assign(6, 1);
      batch.ref_logps[1] = -INFINITY;
      PolicyObjective objective = penalty_alone(K3{}, correction);
      objective.level = level;
      EXPECT_TRUE(std::isnan(batch.run(objective).loss));
      for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(batch.dlogps[i])) << i;
      for (size_t i = 3; i < 6; ++i) EXPECT_TRUE(std::isfinite(batch.dlogps[i])) << i;
    }
  }
}

// A user's own: scale d^2, twice k2 where scale is 1.
struct Square {
  double scale = 1;

  static constexpr auto fields() { return std::tuple{field("scale", &Square::scale, {0, 10})}; }
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return d * d * scale;
  }
};

template <class T>
void expect_own_form() {
  for (const KlCorrection correction :
       {KlCorrection::none, KlCorrection::ratio, KlCorrection::detached_ratio,
        KlCorrection::level_ratio, KlCorrection::detached_level_ratio, KlCorrection::on_policy,
        KlCorrection::rollout_ratio, KlCorrection::detached_rollout_ratio}) {
    for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean,
                                   RatioLevel::sequence_token, RatioLevel::sequence_sum}) {
      Batch<T> batch = random_batch<T>(3, 37);
      PolicyObjective own = penalty_alone(Square{0.5}, correction);
      PolicyObjective known = penalty_alone(K2{}, correction);
      own.level = known.level = level;
      const double loss = batch.run(known).loss;
      const std::vector<T> gradient = batch.dlogps;
      EXPECT_EQ(batch.run(own).loss, loss);
      for (size_t i = 0; i < gradient.size(); ++i) {
        EXPECT_NEAR(batch.dlogps[i], gradient[i], 1e-6) << i;
      }
    }
  }
}
TEST(KlPenalty, OfAUsersOwnFormInFloat) { expect_own_form<float>(); }
TEST(KlPenalty, OfAUsersOwnFormInDouble) { expect_own_form<double>(); }

// d = ref_logp - logp is 1, u = logp - old_logp is log 2. NeMo-RL: value k3, slope -d.
TEST(KlPenalty, OnPolicyHasTheValueWithoutARatioAndTheGradientOfOne) {
  Batch<double> batch(1, 1);
  batch.mask = {1};
  batch.logps = {-2};
  batch.old_logps = {-2 - std::log(2)};
  batch.ref_logps = {-1};
  EXPECT_DOUBLE_EQ(batch.run(penalty_alone(K3{}, KlCorrection::on_policy)).loss, std::exp(1) - 2);
  EXPECT_DOUBLE_EQ(batch.dlogps[0], -1);
}

// rho = policy / engine is 3, policy / old 2; d = 1. NeMo-RL, use_on_policy_kl_approximation:
// e^(logp - rollout_logp), in the graph.
TEST(KlPenalty, TheEnginesRatioWeighsAtEveryLevel) {
  Batch<double> batch(1, 1);
  batch.mask = {1};
  batch.logps = {-2};
  batch.old_logps = {-2 - std::log(2)};
  batch.rollout_logps = {-2 - std::log(3)};
  batch.ref_logps = {-1};
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean,
                                 RatioLevel::sequence_token, RatioLevel::turn_sum}) {
    PolicyObjective live = penalty_alone(K3{}, KlCorrection::rollout_ratio);
    live.level = level;
    EXPECT_DOUBLE_EQ(batch.run(live).loss, 3 * (std::exp(1) - 2));
    EXPECT_DOUBLE_EQ(batch.dlogps[0], -3);  // -rho d
    live.kl.ratio_high = 2.5;
    EXPECT_DOUBLE_EQ(batch.run(live).loss, 2.5 * (std::exp(1) - 2));
    PolicyObjective detached = penalty_alone(K3{}, KlCorrection::detached_rollout_ratio);
    detached.level = level;
    EXPECT_DOUBLE_EQ(batch.run(detached).loss, 3 * (std::exp(1) - 2));
    EXPECT_DOUBLE_EQ(batch.dlogps[0], 3 * (1 - std::exp(1)));  // rho (1 - e^d)
  }
}

TEST(KlPenalty, WhatIsNotFiniteInTheEnginesRatioIsSeen) {
  for (const double broken : {double(INFINITY), -double(INFINITY), double(NAN)}) {
    for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean}) {
      Batch<double> batch(1, 2);
      batch.mask = {1, 1};
      batch.rollout_logps = {0, broken};
      PolicyObjective objective = penalty_alone(K3{}, KlCorrection::rollout_ratio);
      objective.level = level;
      const PolicyTotals out = batch.run(objective);
      EXPECT_TRUE(std::isnan(out.loss)) << broken;
      EXPECT_TRUE(std::isnan(batch.dlogps[1])) << broken;
      batch.mask = {1, 0};
      EXPECT_TRUE(std::isfinite(batch.run(objective).loss)) << broken;
    }
  }
}

TEST(KlPenalty, TheEnginesRatioNeedsItsLogProbabilities) {
  const auto message = [](const PolicyObjective& objective) -> std::string {
    try {
      check_needs("f", PolicyInputs<bool>{.ref_logps = true}, objective);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  PolicyObjective objective = penalty_alone(K3{}, KlCorrection::none);
  EXPECT_EQ(message(objective), "no error");
  const auto needed =
      "f: rollout_logps must be given when beta is greater than 0 and kl_reference is rollout or "
      "kl_correction a rollout_ratio, got none";
  for (const KlCorrection correction :
       {KlCorrection::rollout_ratio, KlCorrection::detached_rollout_ratio}) {
    objective.kl.correction = correction;
    objective.kl.beta = 1;
    EXPECT_EQ(message(objective), needed);
    objective.kl.beta = 0;
    EXPECT_EQ(message(objective), "no error");
  }
}

TEST(KlPenalty, ALargerRatioCountsAsItsBound) {
  Batch<double> batch(1, 1);
  batch.mask = {1};
  batch.logps = {-2};
  batch.old_logps = {-2 - std::log(2)};
  batch.ref_logps = {-1};
  PolicyObjective objective = penalty_alone(K2{}, KlCorrection::detached_ratio);
  for (const double high : {infinity, 3.0, 1.5, 0.5}) {
    objective.kl.ratio_high = high;
    const double rho = std::min(2.0, high);
    EXPECT_DOUBLE_EQ(batch.run(objective).loss, rho / 2) << high;
    EXPECT_DOUBLE_EQ(batch.dlogps[0], -rho) << high;
  }
}

TEST(KlPenalty, AUsersValueGoesWithAKnownGradient) {
  Batch<double> batch = random_batch<double>(3, 37);
  PolicyObjective objective = presets::ppo();
  objective.kl = {.beta = 1, .gradient = K2{}};
  batch.run(objective);
  const std::vector<double> gradient = batch.dlogps;
  objective.kl.estimator = Square{};
  batch.run(objective);
  EXPECT_EQ(batch.dlogps, gradient);
}

TEST(KlPenalty, AUsersFormIsCheckedAsTheOthers) {
  const auto message = [](const PolicyObjective& objective) -> std::string {
    try {
      check_objective("f", objective);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  PolicyObjective objective = presets::ppo();
  objective.kl.beta = 1;
  objective.kl.estimator = Square{};
  EXPECT_EQ(message(objective), "no error");
  set_option("f", objective, "kl_estimator.scale", 3);
  EXPECT_EQ(objective.kl.estimator.target<Square>()->scale, 3);
  objective.kl.estimator = Square{11};
  EXPECT_EQ(message(objective), "f: kl_estimator.scale must be in [0, 10], got 11");
  objective.kl.estimator = objective.kl.gradient = Square{};
  EXPECT_EQ(message(objective),
            "f: kl_gradient must be k2 or k3 or low_var_kl with kl_correction none, got another "
            "type, whose "
            "gradient is not that of a KL divergence. Choose another one or set "
            "allow_biased_gradient");
}

}  // namespace
}  // namespace tether
