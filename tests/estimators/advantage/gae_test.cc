#include "estimators/advantage/gae.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "estimators/advantage/group.h"
#include "estimators/advantage/returns.h"
#include "tests/error_message.h"

namespace tether {
namespace {

using testing::DoubleNear;
using testing::Each;
using testing::ElementsAre;
using testing::Pointwise;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<double> advantages(const std::vector<double>& rewards, int64_t group_size,
                               const GroupAdvantage& options = {}) {
  std::vector<double> out(rewards.size(), kNaN);
  group_advantage(rewards.data(), int64_t(rewards.size()), group_size, options, out.data());
  return out;
}

std::vector<double> advantages(const std::vector<double>& rewards, const std::vector<int64_t>& ids,
                               const GroupAdvantage& options = {}) {
  std::vector<double> out(rewards.size(), kNaN);
  group_advantage(rewards.data(), ids.data(), int64_t(rewards.size()), options, out.data());
  return out;
}

// Rewards 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, std with N - 1 = sqrt(7).
TEST(GroupAdvantage, MatchesAGroupByHand) {
  const double std = std::sqrt(7.0) + 0.5;
  EXPECT_THAT(advantages({1, 2, 6}, 3, {.epsilon = 0.5}),
              Pointwise(DoubleNear(1e-15), {-2 / std, -1 / std, 3 / std}));
  EXPECT_THAT(advantages({1, 2, 6}, 3, {.scale = AdvantageScale::none}), ElementsAre(-2, -1, 3));
}

TEST(GroupAdvantage, EqualRewardsAreExactlyZero) {
  for (double reward : {0.1, 0.2, 0.7, 100.1, -3.3, 1e30}) {
    for (int n = 1; n <= 64; ++n) {
      const std::vector<float> rewards(static_cast<size_t>(n), static_cast<float>(reward));
      std::vector<float> out(rewards.size(), 1.0f);
      group_advantage(rewards.data(), n, n, {.epsilon = 0}, out.data());
      for (float each : out) ASSERT_EQ(each, 0.0f) << reward << " x " << n;
    }
  }
}

TEST(GroupAdvantage, AGroupOfOneIsZeroAndAGroupOfTwoIsOneOverRootTwo) {
  EXPECT_THAT(advantages({5}, 1), ElementsAre(0));
  EXPECT_THAT(advantages({5, 9}, 2, {.epsilon = 0}),
              Pointwise(DoubleNear(1e-15), {-std::sqrt(0.5), std::sqrt(0.5)}));
}

TEST(GroupAdvantage, GroupsAreIndependentAndMayInterleave) {
  const std::vector<double> sorted = advantages({1, 2, 6, 10, 30, 20}, 3);
  EXPECT_THAT(advantages({1, 10, 2, 30, 20, 6},
                         std::vector<int64_t>{-7, 1LL << 60, -7, 1LL << 60, 1LL << 60, -7}),
              ElementsAre(sorted[0], sorted[3], sorted[1], sorted[4], sorted[5], sorted[2]));
}

TEST(GroupAdvantage, ShiftsAndScalesOfTheRewardsDoNotMatter) {
  const std::vector<double> plain = advantages({1, 2, 6, 3}, 4, {.epsilon = 0});
  EXPECT_THAT(advantages({17, 18, 22, 19}, 4, {.epsilon = 0}), Pointwise(DoubleNear(1e-14), plain));
  EXPECT_THAT(advantages({8, 16, 48, 24}, 4, {.epsilon = 0}), Pointwise(DoubleNear(1e-14), plain));
  double sum = 0;
  for (double each : plain) sum += each;
  EXPECT_NEAR(sum, 0, 1e-15);
}

TEST(GroupAdvantage, AMissingRewardLeavesItsGroupAsIfItWereAbsent) {
  const GroupAdvantage missing{.nan_reward = NanReward::missing};
  const std::vector<double> without = advantages({1, 2, 6}, 3);
  EXPECT_THAT(advantages({kNaN, 1, 2, 6}, 4, missing),
              ElementsAre(0, without[0], without[1], without[2]));
  EXPECT_THAT(advantages({kNaN, 4, kNaN, kNaN}, 2, missing), ElementsAre(0, 0, 0, 0));
}

TEST(GroupAdvantage, BaselinesAndScalesOfTheTable) {
  using B = AdvantageBaseline;
  using S = AdvantageScale;
  // Groups 1, 2, 6 and 3, 3, 3; all: mean 3, squares 14, std sqrt(14 / 5).
  const std::vector<double> rewards{1, 2, 6, 3, 3, 3};
  const double all = std::sqrt(14.0 / 5), own = std::sqrt(7.0);
  const auto of = [&](B baseline, S scale) {
    return advantages(rewards, 3, {.baseline = baseline, .scale = scale, .epsilon = 0});
  };
  const auto near = [](std::vector<double> expected) {
    return Pointwise(DoubleNear(1e-15), expected);
  };
  EXPECT_THAT(of(B::leave_one_out, S::none), near({1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0}));
  EXPECT_THAT(of(B::mean, S::batch_std), near({-2 / all, -1 / all, 3 / all, 0, 0, 0}));
  EXPECT_THAT(of(B::leave_one_out, S::group_std), near({-3 / own, -1.5 / own, 4.5 / own, 0, 0, 0}));
  EXPECT_THAT(of(B::none, S::none), near({1, 2, 6, 3, 3, 3}));
  EXPECT_THAT(of(B::none, S::batch_std),
              near({1 / all, 2 / all, 6 / all, 3 / all, 3 / all, 3 / all}));
  EXPECT_THAT(advantages({5, 7}, 1, {.baseline = B::leave_one_out}), ElementsAre(0, 0));
  EXPECT_THAT(advantages({5, 7}, 1, {.baseline = B::none, .scale = S::none}), ElementsAre(5, 7));
  EXPECT_THAT(of(B::mean, S::group_mean), near({-2 / 3.0, -1 / 3.0, 1, 0, 0, 0}));
  EXPECT_THAT(of(B::leave_one_out, S::group_mean), near({-1, -0.5, 1.5, 0, 0, 0}));
  EXPECT_THAT(of(B::none, S::group_mean), near({1 / 3.0, 2 / 3.0, 2, 1, 1, 1}));
  EXPECT_THAT(of(B::best_of_others, S::none), near({0, 0, 4, 0, 0, 0}));
  EXPECT_THAT(of(B::best_of_others, S::group_std), near({0, 0, 4 / own, 0, 0, 0}));
  EXPECT_THAT(of(B::best_of_others, S::batch_std), near({0, 0, 4 / all, 0, 0, 0}));
}

// What the best answer adds to pass@k, wherever it stands; two that are best add nothing.
TEST(GroupAdvantage, TheBestLessTheBestOfTheOthers) {
  const GroupAdvantage best{.baseline = AdvantageBaseline::best_of_others,
                            .scale = AdvantageScale::none};
  EXPECT_THAT(advantages({6, 1, 2, 1, 6, 2, 1, 2, 6}, 3, best),
              ElementsAre(4, 0, 0, 0, 4, 0, 0, 0, 4));
  EXPECT_THAT(advantages({6, 6, 2, -1, -1, -5, -9, -4, -5}, 3, best),
              ElementsAre(0, 0, 0, 0, 0, 0, 0, 1, 0));
  EXPECT_THAT(advantages({5, 7}, 1, best), ElementsAre(0, 0));
  const GroupAdvantage missing{.baseline = AdvantageBaseline::best_of_others,
                               .scale = AdvantageScale::none,
                               .nan_reward = NanReward::missing};
  EXPECT_THAT(advantages({kNaN, 4, kNaN, kNaN, 4, 3}, 3, missing), ElementsAre(0, 0, 0, 0, 1, 0));
}

// Of a success among n answers n - 1, of a failure -1, shrunk by epsilon; without a success
// nothing.
TEST(GroupAdvantage, OverTheMeanOfTheGroup) {
  const GroupAdvantage max_rl{.scale = AdvantageScale::group_mean, .epsilon = 0.25};
  EXPECT_THAT(advantages({1, 0, 0, 0}, 4, {.scale = AdvantageScale::group_mean, .epsilon = 0}),
              ElementsAre(3, -1, -1, -1));
  EXPECT_THAT(advantages({1, 0, 0, 0}, 4, max_rl), ElementsAre(1.5, -0.5, -0.5, -0.5));
  EXPECT_THAT(advantages({0, 0, 0, 0, 1, -1, -3, -5}, 2, max_rl), Each(0.0));
}

TEST(GroupAdvantage, IsFiniteForAnyFiniteReward) {
  const double root = std::sqrt(0.5);
  for (double size : {1.7e308, 1e200, 1e-170, 1e-300}) {
    EXPECT_THAT(advantages({size, -size}, 2, {.epsilon = 0}),
                Pointwise(DoubleNear(1e-15), {root, -root}));
  }
}

TEST(GroupAdvantage, BadInputGetsOneClearError) {
  EXPECT_EQ(message([] { advantages({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 4); }),
            "group_advantage: rewards must divide into groups of 4, got 10. Pass group ids for "
            "ragged groups");
  EXPECT_EQ(message([] { advantages({1, 2}, 0); }),
            "group_advantage: group_size must be at least 1, got 0");
  EXPECT_EQ(message([] { advantages({1, kNaN}, 2); }),
            "group_advantage: rewards must be finite, got nan at [1]. Pass nan_reward = missing to "
            "leave it out of its group");
  EXPECT_EQ(message([] { advantages({1, INFINITY}, 2, {.nan_reward = NanReward::missing}); }),
            "group_advantage: rewards must be finite, got inf at [1]");
  EXPECT_EQ(message([] { advantages({1, 2}, 2, {.epsilon = -1}); }),
            "group_advantage: epsilon must be in [0, 1e+12], got -1");
}

std::vector<double> returns(const std::vector<double>& rewards, const std::vector<double>& mask,
                            const DiscountedReturns& options, double bootstrap = 0) {
  const int64_t n = int64_t(rewards.size());
  const RowLayout layout{.rows = 1, .columns = n};
  std::vector<double> out(rewards.size(), kNaN);
  discounted_returns({.layout = layout,
                      .rewards = {rewards.data(), DType::float64, n, 1},
                      .response_mask = {mask.data(), DType::float64, n, 1},
                      .bootstrap = {&bootstrap, DType::float64, 1, 0, true}},
                     options, {out.data(), DType::float64, n, 1});
  return out;
}

TEST(DiscountedReturns, MatchTheRecursionByHand) {
  EXPECT_THAT(returns({1, 2, 4}, {1, 1, 1}, {.gamma = 0.5}), ElementsAre(3, 4, 4));
  EXPECT_THAT(returns({1, 2, 4}, {1, 1, 1}, {.gamma = 0.5}, 8), ElementsAre(4, 6, 8));
  EXPECT_THAT(returns({1, 2, 4}, {1, 1, 1}, {.gamma = 0}), ElementsAre(1, 2, 4));
}

TEST(DiscountedReturns, AMaskedGapIsCarriedOrDecays) {
  EXPECT_THAT(returns({1, kNaN, kNaN, 4}, {1, 0, 0, 1}, {.gamma = 0.5}), ElementsAre(3, 0, 0, 4));
  EXPECT_THAT(returns({1, kNaN, kNaN, 4}, {1, 0, 0, 1}, {.gamma = 0.5, .gap = MaskGap::decay}),
              ElementsAre(1.5, 0, 0, 4));
}

TEST(DiscountedReturns, PaddingIsNoGap) {
  for (MaskGap gap : {MaskGap::carry, MaskGap::decay}) {
    EXPECT_THAT(returns({kNaN, 1, 2, 4, kNaN}, {0, 1, 1, 1, 0}, {.gamma = 0.5, .gap = gap}, 8),
                ElementsAre(0, 4, 6, 8, 0));
  }
}

TEST(DiscountedReturns, LongRowsCrossBlocks) {
  const size_t n = 2 * kBlock + 5;
  const std::vector<double> out = returns(std::vector<double>(n, 1), std::vector<double>(n, 1), {});
  for (size_t t = 0; t < n; ++t) ASSERT_EQ(out[t], double(n - t));
}

TEST(DiscountedReturns, GammaIsChecked) {
  EXPECT_EQ(message([] { returns({1}, {1}, {.gamma = 1.5}); }),
            "discounted_returns: gamma must be in [0, 1], got 1.5");
}

TEST(DiscountedReturns, ArraysAreCheckedBeforeTheyAreRead) {
  double numbers[3] = {1, 2, 4}, out[3];
  const ConstArray given{numbers, DType::float64, 3, 1};
  const MutableArray returns{out, DType::float64, 3, 1};
  const RowLayout layout{.rows = 1, .columns = 3};
  EXPECT_EQ(message([&] { discounted_returns({layout, given}, {}, returns); }),
            "discounted_returns: response_mask must be given, got none");
  EXPECT_EQ(message([&] {
              discounted_returns({layout, {nullptr, DType::float64, 3, 1}, given}, {}, returns);
            }),
            "discounted_returns: rewards must point to 3 elements, got null");
  EXPECT_EQ(message([&] { discounted_returns({layout, given, given}, {}, {}); }),
            "discounted_returns: returns must be given, got none");
  EXPECT_EQ(
      message([&] { discounted_returns({layout, given, given}, {}, {out, DType::boolean, 3, 1}); }),
      "discounted_returns: returns must be float32, float64, bfloat16 or float16, got "
      "boolean");
  const int32_t offsets[] = {0, 2, 1};
  EXPECT_EQ(message([&] {
              discounted_returns({{.rows = 2, .offsets32 = offsets}, given, given}, {}, returns);
            }),
            "discounted_returns: offsets must not decrease, got 1 after 2 at [2]");
}

// ---- generalized advantage estimation ----------------------------------------------------------

struct GaeCase {
  int64_t rows, columns;
  std::vector<double> rewards, values, mask, bootstrap, done, truncated, truncation_values, lambdas,
      advantages, returns;

  GaeCase(int64_t b, int64_t t, unsigned seed) : rows(b), columns(t) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& array, int64_t size, auto draw) {
      array.resize(size_t(size));
      for (double& each : array) each = draw();
    };
    fill(rewards, b * t, [&] { return normal(random); });
    fill(values, b * t, [&] { return normal(random); });
    fill(mask, b * t, [&] { return random() % 4 != 0; });
    fill(bootstrap, b, [&] { return normal(random); });
    fill(done, b * t, [&] { return random() % 16 == 0; });
    fill(truncated, b * t, [&] { return random() % 16 == 0; });
    fill(truncation_values, b * t, [&] { return normal(random); });
    fill(lambdas, b, [&] { return double(random() % 100) / 100; });
    advantages.assign(size_t(b * t), kNaN);
    returns = advantages;
    for (size_t i = 0; i < mask.size(); ++i) {
      if (mask[i] == 0) rewards[i] = values[i] = truncation_values[i] = kNaN;
    }
  }
  ConstArray tokens(const std::vector<double>& array) const {
    return {array.data(), DType::float64, columns, 1};
  }
  ConstArray per_row(const std::vector<double>& array) const {
    return {.data = array.data(), .dtype = DType::float64, .row_stride = 1, .per_row = true};
  }
  GaeArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .rewards = tokens(rewards),
            .values = tokens(values),
            .response_mask = tokens(mask),
            .bootstrap = per_row(bootstrap),
            .done = tokens(done),
            .truncated = tokens(truncated),
            .truncation_values = tokens(truncation_values),
            .lambdas = per_row(lambdas)};
  }
  void run(const GaeArrays& batch, const Gae& options, const Executor& executor = {}) {
    generalized_advantage_estimation(batch, options,
                                     {advantages.data(), DType::float64, columns, 1},
                                     {returns.data(), DType::float64, columns, 1}, executor);
  }
};

// arXiv:1506.02438, eq. 16 as the sum it is: A_t = sum_l (gamma lambda)^l delta_{t+l}, over the
// tokens of the row without its gaps; with decay a gap of k slots costs (gamma lambda)^k, and
// gamma^k on the next value.
double gae_by_definition(const GaeCase& batch, const Gae& options, int64_t row, int64_t start) {
  const double lambda = batch.lambdas[size_t(row)];
  double sum = 0, weight = 1;
  for (int64_t t = start; t < batch.columns;) {
    const size_t i = size_t(row * batch.columns + t);
    int64_t next = t + 1;
    while (next < batch.columns && batch.mask[size_t(row * batch.columns + next)] == 0) ++next;
    const bool last = next == batch.columns, decays = options.gap == MaskGap::decay && !last;
    const double steps = decays ? double(next - t) : 1;
    double value =
        last ? batch.bootstrap[size_t(row)] : batch.values[size_t(row * batch.columns + next)];
    const bool cut = batch.truncated[i] != 0 || batch.done[i] != 0;
    value *= std::pow(options.gamma, steps);
    if (batch.truncated[i] != 0) value = options.gamma * batch.truncation_values[i];
    if (batch.done[i] != 0) value = 0;
    sum += weight * (batch.rewards[i] + value - batch.values[i]);
    weight *= std::pow(options.gamma * lambda, steps);
    if (cut) break;
    t = next;
  }
  return sum;
}

TEST(Gae, IsTheSumOfDiscountedResiduals) {
  for (const MaskGap gap : {MaskGap::carry, MaskGap::decay}) {
    GaeCase batch(5, 600, 3);
    const Gae options{.gamma = 0.97, .gap = gap};
    batch.run(batch.arrays(), options);
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t t = 0; t < 600; ++t) {
        const size_t i = size_t(row * 600 + t);
        const double expected = batch.mask[i] == 0 ? 0 : gae_by_definition(batch, options, row, t);
        EXPECT_NEAR(batch.advantages[i], expected, 1e-11) << row << " " << t;
        EXPECT_NEAR(batch.returns[i], batch.mask[i] == 0 ? 0 : expected + batch.values[i], 1e-11);
      }
    }
  }
}

TEST(Gae, LambdaOneGivesTheDiscountedReturns) {
  for (const MaskGap gap : {MaskGap::carry, MaskGap::decay}) {
    GaeCase batch(4, 300, 5);
    GaeArrays arrays = batch.arrays();
    arrays.done = arrays.truncated = arrays.truncation_values = arrays.lambdas = {};
    batch.run(arrays, {.gamma = 0.9, .lambda = 1, .gap = gap});
    std::vector<double> expected(1200);
    discounted_returns({arrays.layout, arrays.rewards, arrays.response_mask, arrays.bootstrap},
                       {.gamma = 0.9, .gap = gap}, {expected.data(), DType::float64, 300, 1});
    EXPECT_THAT(batch.returns, Pointwise(DoubleNear(1e-13), expected));
  }
}

TEST(Gae, SameBitsInAnyOrderOfItsChunks) {
  GaeCase batch(40, 700, 7);
  batch.run(batch.arrays(), {.gamma = 0.99});
  const std::vector<double> serial = batch.advantages;
  const Executor backwards{.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    for (int64_t i = tasks - 1; i >= 0; --i) task(argument, i);
  }};
  batch.advantages.assign(batch.advantages.size(), kNaN);
  batch.run(batch.arrays(), {.gamma = 0.99}, backwards);
  EXPECT_EQ(batch.advantages, serial);
}

TEST(Gae, BadInputGetsOneClearError) {
  const auto error = [](auto change) {
    GaeCase batch(2, 3, 1);
    GaeArrays arrays = batch.arrays();
    Gae options;
    change(arrays, options);
    const std::string out = message([&] { batch.run(arrays, options); });
    EXPECT_TRUE(std::isnan(batch.advantages[0])) << out;
    return out;
  };
  using A = GaeArrays;
  const std::string name = "generalized_advantage_estimation: ";
  EXPECT_EQ(error([](A&, Gae& o) { o.gamma = 1.1; }), name + "gamma must be in [0, 1], got 1.1");
  EXPECT_EQ(error([](A&, Gae& o) { o.lambda = -1; }), name + "lambda must be in [0, 1], got -1");
  EXPECT_EQ(error([](A& a, Gae&) { a.values = {}; }), name + "values must be given, got none");
  EXPECT_EQ(error([](A& a, Gae&) { a.truncation_values = {}; }),
            name + "truncation_values must be given, got none");
}

}  // namespace
}  // namespace tether
