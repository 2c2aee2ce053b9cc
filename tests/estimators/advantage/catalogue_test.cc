// What every recursion and every rule of groups keeps, over all rows of the catalogue.
#include "estimators/advantage/catalogue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "estimators/advantage/groups.h"
#include "tests/error_message.h"
#include "tests/estimators/advantage/recursion_rows.h"

namespace tether {
namespace {

using namespace recursion_test;
using testing::Each;
using testing::ElementsAre;

// ---- recursions
// ----------------------------------------------------------------------------------

TEST(Recursions, MaskedSlotsAreNotLookedAtAndComeOutAsZero) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    const RowResults clean = rows.run(recursion);
    for (size_t i = 0; i < rows.mask.size(); ++i) {
      if (rows.mask[i] != 0) continue;
      for (Doubles* each : rows.of_tokens()) {
        if (each != &rows.mask) (*each)[i] = kNaN;
      }
      ASSERT_EQ(clean.advantages[i], 0);
      ASSERT_EQ(clean.returns[i], 0);
    }
    EXPECT_EQ(rows.run(recursion), clean);
  });
}

TEST(Recursions, OverAMaskedGapNothingPassesWithCarry) {
  for_each_case([](const Recursion& recursion) {
    if (recursion.gap() == MaskGap::decay) return;
    const Rows rows;
    const RowResults whole = rows.run(recursion);
    // The tokens end to end, packed.
    Rows dense = rows;
    std::vector<int64_t> offsets{0}, places;
    for (int64_t row = 0; row < rows.rows; ++row) {
      for (int64_t i = row * rows.columns; i < (row + 1) * rows.columns; ++i) {
        if (rows.mask[static_cast<size_t>(i)] != 0) places.push_back(i);
      }
      offsets.push_back(static_cast<int64_t>(places.size()));
    }
    for (Doubles* each : dense.of_tokens()) {
      for (size_t i = 0; i < places.size(); ++i) {
        (*each)[i] = (*each)[static_cast<size_t>(places[i])];
      }
    }
    AdvantageArrays batch = dense.arrays();
    batch.layout = {.rows = rows.rows, .offsets64 = offsets.data()};
    const RowResults packed = dense.run(recursion, batch);
    for (size_t i = 0; i < places.size(); ++i) {
      ASSERT_EQ(packed.advantages[i], whole.advantages[static_cast<size_t>(places[i])]) << i;
      ASSERT_EQ(packed.returns[i], whole.returns[static_cast<size_t>(places[i])]) << i;
    }
  });
}

TEST(Recursions, WhatIsBehindTheEndOfAnEpisodeIsNotLookedAt) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    const RowResults clean = rows.run(recursion);
    // The last end of the first row: a NaN behind it reaches no token before.
    const size_t last = [&] {
      size_t i = static_cast<size_t>(rows.columns) - 2;
      while (rows.mask[i] == 0 || (rows.done[i] == 0 && rows.truncated[i] == 0)) --i;
      return i;
    }();
    ASSERT_GT(last, 300u);
    for (size_t i = last + 1; i < static_cast<size_t>(rows.columns); ++i) {
      rows.rewards[i] = rows.values[i] = rows.log_ratios[i] = kNaN;
    }
    rows.bootstrap[0] = kNaN;
    const RowResults out = rows.run(recursion);
    bool any = false;
    for (size_t i = 0; i < out.advantages.size(); ++i) {
      if (i > last && i < static_cast<size_t>(rows.columns)) {
        any |= rows.mask[i] != 0 && std::isnan(out.advantages[i]);
        continue;
      }
      ASSERT_EQ(out.advantages[i], clean.advantages[i]) << i;
    }
    EXPECT_TRUE(any);
  });
}

TEST(Recursions, AnEpisodeThatIsDoneIsARowOfItsOwn) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    std::fill(rows.truncated.begin(), rows.truncated.end(), 0.0);
    std::fill(rows.done.begin(), rows.done.end(), 0.0);
    std::fill(rows.mask.begin(), rows.mask.end(), 1.0);
    std::fill(rows.bootstrap.begin(), rows.bootstrap.end(), 0.0);
    const RowResults apart = rows.run(recursion);
    for (int64_t row = 1; row <= rows.rows; ++row) {
      rows.done[static_cast<size_t>(row * rows.columns - 1)] = 1;
    }
    rows.columns *= rows.rows;
    rows.rows = 1;
    EXPECT_EQ(rows.run(recursion), apart);
  });
}

TEST(Recursions, SameBitsInAnyOrderOfTheChunks) {
  const Executor backwards{.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    for (int64_t i = tasks - 1; i >= 0; --i) task(argument, i);
  }};
  for_each_case([&](const Recursion& recursion) {
    const Rows rows;
    EXPECT_EQ(rows.run(recursion, backwards), rows.run(recursion));
  });
}

TEST(Recursions, NaNAtATokenComesOutThereAndBefore) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    size_t place = 200;
    while (rows.mask[place] == 0) ++place;
    rows.rewards[place] = kNaN;
    const RowResults out = rows.run(recursion);
    EXPECT_TRUE(std::isnan(out.advantages[place]));
    EXPECT_TRUE(std::isnan(out.returns[place]));
    for (size_t i = place + 1; i < out.advantages.size(); ++i) {
      ASSERT_FALSE(std::isnan(out.advantages[i])) << i;
    }
  });
}

// Of what is not kept too: 0 times it is NaN.
TEST(Recursions, NaNPassesDiscountsOfNothing) {
  for_each_case([](Recursion recursion) {
    recursion.for_each_field([](std::string_view, double& option, const Range&) { option = 0; });
    Rows rows;
    rows.mask.assign(rows.mask.size(), 1);
    for (size_t gap : {10u, 100u, 101u}) rows.mask[gap] = 0;
    rows.rewards[200] = kNaN;
    AdvantageArrays batch = rows.arrays();
    batch.done = batch.truncated = batch.truncation_values = {};
    const RowResults out = rows.run(recursion, batch);
    for (size_t i = 0; i < 600; ++i) {
      ASSERT_EQ(std::isnan(out.advantages[i]), i <= 200 && rows.mask[i] != 0) << i;
      ASSERT_EQ(std::isnan(out.returns[i]), i <= 200 && rows.mask[i] != 0) << i;
    }
  });
}

TEST(Recursions, InfinityAtATokenIsNaN) {
  for_each_case([](const Recursion& recursion) {
    Rows rows;
    size_t place = 200;
    while (rows.mask[place] == 0) ++place;
    for (Doubles* each : {&rows.rewards, &rows.values, &rows.log_ratios}) {
      const double before = (*each)[place];
      const Traits& reads = recursion.traits();
      const bool read = each == &rows.rewards || (each == &rows.values && reads.needs_values) ||
                        (each == &rows.log_ratios && reads.needs_log_ratios);
      for (const double far : {HUGE_VAL, -HUGE_VAL}) {
        (*each)[place] = far;
        const RowResults out = rows.run(recursion);
        EXPECT_EQ(std::isnan(out.advantages[place]), read);
        EXPECT_EQ(std::isnan(out.returns[place]), read);
      }
      (*each)[place] = before;
    }
  });
}

TEST(Recursions, AreNotNaNForAnyFiniteInput) {
  expect_no_nan(40, [](const Rows& rows, const Recursion& recursion, const AdvantageArrays& batch) {
    return rows.run(recursion, batch);
  });
}

TEST(Recursions, WhatTheyReadMustBeGiven) {
  for_each_case([](const Recursion& recursion) {
    const Rows rows;
    const auto without = [&](ConstArray AdvantageArrays::* member) {
      AdvantageArrays batch = rows.arrays();
      batch.*member = {};
      return message([&] { rows.run(recursion, batch); });
    };
    const Traits& reads = recursion.traits();
    EXPECT_EQ(without(&AdvantageArrays::values),
              reads.needs_values ? "advantage: values must be given, got none" : "no error");
    EXPECT_EQ(
        without(&AdvantageArrays::log_ratios),
        reads.needs_log_ratios ? "advantage: log_ratios must be given, got none" : "no error");
    EXPECT_EQ(without(&AdvantageArrays::truncation_values),
              "advantage: truncation_values must be given, got none");
    EXPECT_EQ(without(&AdvantageArrays::rewards), "advantage: rewards must be given, got none");
  });
}

// A recursion of a user: every other part of the token, and a mean of two estimators of it.
struct Halved {
  double gamma = 1;
  MaskGap gap = MaskGap::carry;

  static constexpr Traits traits{.needs_values = true};
  template <class Number>
  Step<Number> step(const RecursionToken<Number>& token) const {
    return {token.reward - token.value, Number{gamma}, Number{gamma / 2}};
  }
  template <class Number>
  Step<Number> advantage(const RecursionToken<Number>& token) const {
    return {token.reward, Number{0}, Number{1}};
  }
};

TEST(Recursions, AUsersOwnNeedsNoCatalogue) {
  const double rewards[] = {1, 2, 4}, values[] = {0.5, 0.25, 1}, ones[] = {1, 1, 1};
  double advantages[3], returns[3];
  const auto array = [](const double* data) { return ConstArray{data, DType::float64, 3, 1}; };
  scan_rows("mine",
            {.layout = {.rows = 1, .columns = 3},
             .rewards = array(rewards),
             .values = array(values),
             .response_mask = array(ones)},
            Halved{.gamma = 0.5}, {advantages, DType::float64, 3, 1},
            {returns, DType::float64, 3, 1});
  // x = 3; 1.75 + 0.5 + 0.75 = 3; 0.5 + 0.125 + 0.75 = 1.375. A = r + x of the next token.
  EXPECT_THAT(returns, ElementsAre(1.875, 3.25, 4));
  EXPECT_THAT(advantages, ElementsAre(1 + 3, 2 + 3, 4));
}

// ---- rules of groups
// -----------------------------------------------------------------------------

struct Answers {
  Doubles rewards, lengths;
  std::vector<int64_t> ids;

  // Five groups of 1 to 9 answers in random order.
  explicit Answers(unsigned seed = 5) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t group = 0; group < 5; ++group) {
      for (int64_t i = 0; i < 1 + 2 * group; ++i) ids.push_back(group * 1000 - 7);
    }
    std::shuffle(ids.begin(), ids.end(), random);
    for (size_t i = 0; i < ids.size(); ++i) {
      rewards.push_back(normal(random));
      lengths.push_back(double(1 + random() % 100));
    }
  }
  Doubles run(const GroupRule& rule) const {
    Doubles out(rewards.size(), kNaN);
    advantages_of_groups("advantage",
                         {.rewards = rewards.data(),
                          .group_ids = ids.data(),
                          .lengths = lengths.data(),
                          .count = static_cast<int64_t>(rewards.size())},
                         rule, out.data());
    return out;
  }
  void keep(const std::vector<size_t>& places) {
    Answers all = *this;
    rewards.clear(), lengths.clear(), ids.clear();
    for (const size_t i : places) {
      rewards.push_back(all.rewards[i]);
      lengths.push_back(all.lengths[i]);
      ids.push_back(all.ids[i]);
    }
  }
};

template <class Check>
void for_each_rule(Check check) {
  for_each_group_rule([&](const auto& row) {
    SCOPED_TRACE(std::string(row.name));
    auto rule = row.defaults;
    rule.nan_reward = NanReward::missing;
    check(GroupRule(rule));
  });
}

TEST(GroupRules, GroupsAreIndependent) {
  for_each_rule([](const GroupRule& rule) {
    const Answers all;
    const Doubles whole = all.run(rule);
    for (const int64_t id : {-7, 993, 1993, 2993, 3993}) {
      Answers one = all;
      std::vector<size_t> places;
      for (size_t i = 0; i < all.ids.size(); ++i) {
        if (all.ids[i] == id) places.push_back(i);
      }
      one.keep(places);
      const Doubles alone = one.run(rule);
      ASSERT_FALSE(alone.empty());
      for (size_t i = 0; i < places.size(); ++i) ASSERT_EQ(alone[i], whole[places[i]]);
    }
  });
}

TEST(GroupRules, EqualRewardsAreExactlyZero) {
  for_each_rule([](const GroupRule& rule) {
    Answers equal;
    for (const double reward : {0.1, 0.7, 100.1, -3.3, 1e30}) {
      std::fill(equal.rewards.begin(), equal.rewards.end(), reward);
      EXPECT_THAT(equal.run(rule), Each(0.0)) << reward;
    }
  });
}

TEST(GroupRules, AMissingRewardIsAsIfItWereAbsent) {
  for_each_rule([](const GroupRule& rule) {
    Answers some;
    std::vector<size_t> there;
    for (size_t i = 0; i < some.rewards.size(); ++i) {
      if (i % 3 == 0) some.rewards[i] = kNaN;
      if (i % 3 != 0) there.push_back(i);
    }
    const Doubles with = some.run(rule);
    some.keep(there);
    const Doubles without = some.run(rule);
    for (size_t i = 0; i < there.size(); ++i) ASSERT_EQ(with[there[i]], without[i]);
    for (size_t i = 0; i < with.size(); i += 3) ASSERT_EQ(with[i], 0);
    std::fill(some.rewards.begin(), some.rewards.end(), kNaN);
    EXPECT_THAT(some.run(rule), Each(0.0));
  });
}

TEST(GroupRules, AreFiniteForAnyFiniteReward) {
  for_each_rule([](const GroupRule& rule) {
    for (const double size : {8e307, 1e200, 1e-170, 5e-324}) {
      Answers extreme;
      for (double& each : extreme.rewards) each = std::copysign(size, each);
      for (const double each : extreme.run(rule)) EXPECT_TRUE(std::isfinite(each)) << size;
    }
  });
}

TEST(GroupRules, WhatTheyReadIsChecked) {
  for_each_rule([](const GroupRule& rule) {
    const double rewards[] = {1, 2};
    double lengths[] = {3, -1}, out[] = {7, 7};
    const auto said = [&](const double* given) {
      return message([&] {
        advantages_of_groups("advantage",
                             {.rewards = rewards, .lengths = given, .group_size = 2, .count = 2},
                             rule, out);
      });
    };
    EXPECT_EQ(said(nullptr), rule.traits().needs_lengths
                                 ? "advantage: lengths must be given, got none"
                                 : "no error");
    out[0] = 7;
    const bool needs = rule.traits().needs_lengths;
    EXPECT_EQ(said(lengths), needs
                                 ? "advantage: lengths must be at least 0 and finite, got -1 at [1]"
                                 : "no error");
    EXPECT_EQ(out[0] == 7, needs);
    const int64_t ids[] = {1, 1};
    EXPECT_EQ(message([&] {
                advantages_of_groups(
                    "advantage",
                    {.rewards = rewards, .group_ids = ids, .group_size = 2, .count = 2}, rule, out);
              }),
              "advantage: group_size must be 0 beside group_ids, got 2");
    advantages_of_groups("advantage", {}, rule, nullptr);  // of nothing
  });
}

// A rule of a user: the best answer alone.
struct Best {
  NanReward nan_reward = NanReward::error;

  Group::Number operator()(const Group& group, int64_t i) const {
    return group.reward[i] == *std::max_element(group.reward, group.reward + group.size);
  }
};

TEST(GroupRules, AUsersOwnNeedsNoCatalogue) {
  const double rewards[] = {1, 2, 4, 3};
  double out[4];
  advantages_of_groups("mine", {.rewards = rewards, .group_size = 2, .count = 4}, Best{}, out);
  EXPECT_THAT(out, ElementsAre(0, 1, 1, 0));
}

// ---- by name
// -------------------------------------------------------------------------------------

TEST(AdvantageCatalogue, AnEstimatorIsAChoiceWithItsOptions) {
  AdvantageOptions<Recursion> options;
  set_choice("f", options, "estimator", "returns");
  set_choice("f", options, "gap", "decay");
  set_option("f", options, "gamma", 0.5);
  EXPECT_EQ(options.estimator.gap(), MaskGap::decay);
  EXPECT_EQ(options.estimator.gamma(), 0.5);
  EXPECT_EQ(message([&] { set_option("f", options, "lambda", 0.5); }),
            "f: option must be one of gamma, got \"lambda\"");
  EXPECT_EQ(message([&] {
              set_choice("f", options, "estimator", "grpo");
            }).rfind("f: estimator must be one of gae, returns", 0),
            0u);
  AdvantageOptions<GroupRule> rules;
  set_choice("f", rules, "estimator", "rloo");
  size_t found = 0;
  for_each_choice(rules, [&](std::string_view name, const auto& choice, const auto& names) {
    found += name == "baseline" && names[chosen(choice)] == "leave_one_out";
  });
  EXPECT_EQ(found, 1u);
}

}  // namespace
}  // namespace tether
