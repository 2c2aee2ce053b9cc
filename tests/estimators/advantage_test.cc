#include "estimators/advantage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/error_message.h"

namespace tether {
namespace {

using testing::DoubleNear;
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
            "group_advantage: epsilon must be at least 0, got -1");
}

std::vector<double> returns(const std::vector<double>& rewards, const std::vector<double>& mask,
                            const DiscountedReturns& options, double bootstrap = 0) {
  const int64_t n = int64_t(rewards.size());
  const RowLayout layout{.rows = 1, .columns = n};
  std::vector<double> out(rewards.size(), kNaN);
  discounted_returns(layout, {rewards.data(), DType::float64, n, 1},
                     {mask.data(), DType::float64, n, 1}, {&bootstrap, DType::float64, 1, 0, true},
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
  EXPECT_EQ(message([&] { discounted_returns(layout, given, {}, {}, {}, returns); }),
            "discounted_returns: response_mask must be given, got none");
  EXPECT_EQ(message([&] {
              discounted_returns(layout, {nullptr, DType::float64, 3, 1}, given, {}, {}, returns);
            }),
            "discounted_returns: rewards must point to 3 elements, got null");
  EXPECT_EQ(message([&] { discounted_returns(layout, given, given, {}, {}, {}); }),
            "discounted_returns: returns must be given, got none");
  EXPECT_EQ(message([&] {
              discounted_returns(layout, given, given, {}, {}, {out, DType::boolean, 3, 1});
            }),
            "discounted_returns: returns must be float32, float64, bfloat16 or float16, got "
            "boolean");
  const int32_t offsets[] = {0, 2, 1};
  EXPECT_EQ(message([&] {
              discounted_returns({.rows = 2, .offsets32 = offsets}, given, given, {}, {}, returns);
            }),
            "discounted_returns: offsets must not decrease, got 1 after 2 at [2]");
}

}  // namespace
}  // namespace tether
