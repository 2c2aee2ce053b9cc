#include "estimators/advantage/groups_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups.h"
#include "tests/host_team.h"
#include "tests/thread_team.h"

// The program of the CUDA kernel on a team of host threads, beside the CPU kernel.

namespace tether {
namespace {

using testing::Each;
using Floats = std::vector<float>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Answers {
  Floats rewards, lengths;
  std::vector<int64_t> ids;

  // Groups of 1 to 141 answers in random order.
  explicit Answers(unsigned seed = 5) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (const int64_t size : {1, 3, 9, 140, 141})
      ids.insert(ids.end(), size_t(size), size * 7 - 9);
    std::shuffle(ids.begin(), ids.end(), random);
    for (size_t i = 0; i < ids.size(); ++i) {
      rewards.push_back(normal(random));
      lengths.push_back(static_cast<float>(random() % 100));
    }
  }
  std::vector<double> batch_std = {};  // memory for it, or none

  cuda::GroupBatch batch(int64_t group_size = 0) const {
    return {rewards.data(),
            group_size == 0 ? ids.data() : nullptr,
            lengths.data(),
            group_size,
            static_cast<int64_t>(rewards.size()),
            batch_std.empty() ? nullptr : const_cast<double*>(batch_std.data())};
  }
  Floats program(const GroupRule& rule, int64_t group_size = 0, bool backwards = false) const {
    Floats out(rewards.size(), 7);
    const auto in = cuda::group_parameters(batch(group_size), rule, out.data());
    const HostTeam<cuda::kGroupThreads> team{backwards};
    for_each_group_rule([&]<class Rule>(const FormulaRow<Rule>&) {
      const Rule* formula = rule.target<Rule>();
      if (in.batch.batch_std != nullptr) cuda::batch_std_program(team, in);
      for (int64_t i = 0; formula != nullptr && i < in.batch.count; ++i) {
        cuda::group_program(team, *formula, in, i);
      }
    });
    return out;
  }
  std::vector<double> cpu(const GroupRule& rule, int64_t group_size = 0) const {
    const std::vector<double> in(rewards.begin(), rewards.end());
    const std::vector<double> tokens(lengths.begin(), lengths.end());
    std::vector<double> out(in.size());
    advantages_of_groups("advantage",
                         {in.data(), group_size == 0 ? ids.data() : nullptr, tokens.data(),
                          group_size, static_cast<int64_t>(in.size())},
                         rule, out.data());
    return out;
  }
};

// Every baseline with every scale, and the other rules.
template <class Check>
void for_each_rule(Check check) {
  for (auto baseline : {AdvantageBaseline::mean, AdvantageBaseline::leave_one_out,
                        AdvantageBaseline::none, AdvantageBaseline::best_of_others}) {
    for (auto scale : {AdvantageScale::group_std, AdvantageScale::batch_std, AdvantageScale::none,
                       AdvantageScale::group_mean}) {
      check(GroupRule(GroupAdvantage{baseline, scale, 1e-4, NanReward::missing}));
    }
  }
  check(GroupRule(Opo{NanReward::missing}));
}

void expect_near(const Floats& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], 1e-7 * (1 + std::abs(want[i]))) << i;
  }
}

TEST(GroupsProgram, IsTheCpuKernel) {
  for_each_rule([](const GroupRule& rule) {
    const Answers answers;
    expect_near(answers.program(rule), answers.cpu(rule));
    for (int64_t size : {1, 7, 42, 294}) {
      expect_near(answers.program(rule, size, true), answers.cpu(rule, size));
    }
  });
}

TEST(GroupsProgram, AKnownSpreadGivesTheSame) {
  Answers answers;
  std::ranges::replace(answers.ids, int64_t{answers.ids.front()}, INT64_MIN);
  for (size_t i = 0; i < answers.rewards.size(); i += 5) answers.rewards[i] = kNan;
  for_each_rule([&](const GroupRule& rule) {
    Answers known = answers;
    const Floats want = known.program(rule);
    expect_near(want, known.cpu(rule));
    known.batch_std = {7};
    EXPECT_EQ(known.program(rule), want);
  });
}

TEST(GroupsProgram, MissingRewardsAreAsIfTheyWereAbsent) {
  for_each_rule([](const GroupRule& rule) {
    Answers answers;
    for (size_t i = 0; i < answers.rewards.size(); i += 3) answers.rewards[i] = kNan;
    for (int64_t size : {0, 2, 3, 42}) {
      expect_near(answers.program(rule, size), answers.cpu(rule, size));
    }
    std::fill(answers.rewards.begin(), answers.rewards.end(), kNan);
    EXPECT_THAT(answers.program(rule), Each(0.0f));
  });
}

TEST(GroupsProgram, EqualRewardsAreExactlyZero) {
  for (const float reward : {0.1f, 100.1f, -3.3f, 3e38f}) {
    Answers answers;
    std::fill(answers.rewards.begin(), answers.rewards.end(), reward);
    for_each_group_rule([&](const auto& row) {
      EXPECT_THAT(answers.program(row.defaults), Each(0.0f)) << row.name << " " << reward;
    });
  }
}

// Groups without tokens, rewards at the ends of the type.
TEST(GroupsProgram, FiniteInputsGiveFiniteNumbers) {
  Answers answers;
  std::fill(answers.lengths.begin(), answers.lengths.end(), 0.0f);
  expect_near(answers.program(Opo{}), answers.cpu(Opo{}));
  for (float& reward : answers.rewards) reward = std::copysign(3e38f, reward);
  const GroupAdvantage grpo;
  expect_near(answers.program(grpo), answers.cpu(grpo));
}

// The CPU kernel refuses them.
TEST(GroupsProgram, WhatIsNoRewardAndNoLengthIsNaNInItsGroup) {
  for (const float broken : {kNan, HUGE_VALF}) {
    Answers answers;
    answers.rewards[2] = broken;
    const Floats out = answers.program(GroupAdvantage{}, 7);
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(out[i]), i < 7) << i;
    const Floats best =
        answers.program(GroupAdvantage{.baseline = AdvantageBaseline::best_of_others}, 7);
    const Floats over_mean = answers.program(
        GroupAdvantage{.baseline = AdvantageBaseline::none, .scale = AdvantageScale::group_mean},
        7);
    for (size_t i = 0; i < 7; ++i) EXPECT_TRUE(std::isnan(best[i]) && std::isnan(over_mean[i]));
  }
  for (const float broken : {kNan, HUGE_VALF, -1.0f}) {
    Answers answers;
    answers.lengths[9] = broken;
    const Floats out = answers.program(Opo{}, 7);
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(out[i]), i >= 7 && i < 14) << i;
  }
}

TEST(GroupsProgram, RealThreadsHaveTheSameBits) {
  using Team = ThreadTeam<cuda::kGroupThreads>;
  const Answers answers;
  const GroupAdvantage rule{.scale = AdvantageScale::batch_std};
  Floats out(answers.rewards.size());
  const auto in = cuda::group_parameters(answers.batch(), rule, out.data());
  Team::run(4, [&](const Team& team, int i) { cuda::group_program(team, rule, in, i); });
  const Floats want = answers.program(rule);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(out[i], want[i]);
}

}  // namespace
}  // namespace tether
