#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "estimators/advantage/gae.h"
#include "estimators/advantage/group.h"
#include "estimators/advantage/groups.h"
#include "estimators/advantage/opo.h"
#include "estimators/advantage/whitening.h"

// Advantages against verl's own functions, as recorded by tests/peers/record_verl.py and
// record_verl_advantages.py. Where the two differ on purpose:
//
//   a group of one     verl gives the raw reward (over 1 + epsilon with the std), tether 0
//   GAE                verl whitens the advantages at once
//   whitening          verl has n + 1e-8 for n in the mean and in the variance
//   masked slots       verl leaves numbers there, tether 0

namespace tether {
namespace {

using Json = nlohmann::json;
using Doubles = std::vector<double>;

std::vector<Json> recorded(const std::string& estimator) {
  std::vector<Json> out;
  for (const std::string file : {"verl_advantages", "verl_estimators"}) {
    const Json all = Json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/peers/" + file + ".json"));
    for (const Json& each : all["cases"]) {
      if (each["estimator"] == estimator) out.push_back(each);
    }
  }
  return out;
}

struct Rows {
  int64_t rows = 0, columns = 0;
  Doubles data;

  explicit Rows(const Json& json) : rows(int64_t(json.size())), columns(int64_t(json[0].size())) {
    for (const Json& row : json) {
      for (double each : row) data.push_back(each);
    }
  }
  RowLayout layout() const { return {.rows = rows, .columns = columns}; }
  ConstArray view() const { return {data.data(), DType::float64, columns, 1}; }
  MutableArray out() { return {data.data(), DType::float64, columns, 1}; }
};

void expect_equal(const Rows& actual, const Rows& expected, const Rows& mask) {
  for (size_t i = 0; i < mask.data.size(); ++i) {
    if (mask.data[i] == 0) {
      EXPECT_EQ(actual.data[i], 0) << i;
    } else {
      EXPECT_NEAR(actual.data[i], expected.data[i], 1e-12 * std::abs(expected.data[i]) + 1e-14)
          << i;
    }
  }
}

// verl's mean and variance of the active values, as moments that give them.
Moments verl_moments(const Rows& values, const Rows& mask) {
  const Moments exact = moments({mask.layout(), values.view(), mask.view()});
  const double shrink = exact.count / (exact.count + 1e-8), mean = exact.mean * shrink;
  const double off = exact.mean - mean;
  return {exact.count, mean, (exact.squares + exact.count * off * off) * shrink};
}

Rows whitened(const Rows& values, const Rows& mask, const Whitening& options) {
  Rows out = values;
  whiten({mask.layout(), values.view(), mask.view()}, verl_moments(values, mask), options,
         out.out());
  return out;
}

TEST(VerlAdvantages, GaeAndItsWhitening) {
  const std::vector<Json> cases = recorded("gae");
  ASSERT_EQ(cases.size(), 3u);
  for (const Json& each : cases) {
    const Rows rewards(each["rewards"]), values(each["values"]), mask(each["response_mask"]);
    Rows advantages = values, returns = values;
    generalized_advantage_estimation(
        {mask.layout(), rewards.view(), values.view(), mask.view()},
        {.gamma = each["gamma"].get<double>(), .lambda = each["lam"].get<double>()},
        advantages.out(), returns.out());
    expect_equal(returns, Rows(each["returns"]), mask);
    expect_equal(whitened(advantages, mask, {}), Rows(each["advantages"]), mask);
  }
}

TEST(VerlAdvantages, MaskedWhiten) {
  const std::vector<Json> cases = recorded("masked_whiten");
  ASSERT_EQ(cases.size(), 2u);
  for (const Json& each : cases) {
    const Rows values(each["values"]), mask(each["response_mask"]);
    const bool shift_mean = each["shift_mean"];
    expect_equal(whitened(values, mask, {.shift_mean = shift_mean}), Rows(each["whitened"]), mask);
  }
}

// The recorded advantage of an answer is that of its first token; a group of one is `alone`.
void expect_groups(const Json& recorded, const GroupRule& rule, double alone) {
  const auto rewards = recorded["rewards"].get<Doubles>();
  const auto ids = recorded["ids"].get<std::vector<int64_t>>();
  Doubles advantages(rewards.size(), NAN), lengths;
  for (const Json& row : recorded["response_mask"]) {
    lengths.push_back(double(std::count(row.begin(), row.end(), 1)));
  }
  advantages_of_groups("advantage",
                       {.rewards = rewards.data(),
                        .group_ids = ids.data(),
                        .lengths = lengths.data(),
                        .count = int64_t(rewards.size())},
                       rule, advantages.data());
  int singles = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const double expected = recorded["advantages"][i][0];
    if (std::count(ids.begin(), ids.end(), ids[i]) == 1) {
      EXPECT_EQ(advantages[i], 0);
      EXPECT_NEAR(expected, alone * rewards[i], 1e-7);  // verl has 1 + epsilon in float32
      ++singles;
    } else {
      EXPECT_NEAR(advantages[i], expected, 1e-12 * std::abs(expected) + 1e-15) << i;
    }
  }
  EXPECT_EQ(singles, 1);
}

TEST(VerlAdvantages, Grpo) {
  const std::vector<Json> cases = recorded("grpo");
  ASSERT_EQ(cases.size(), 3u);
  for (const Json& each : cases) {
    const bool scaled = each["options"]["norm_adv_by_std_in_grpo"];
    const double epsilon = each["options"].value("epsilon", 1e-6);
    const auto scale = scaled ? AdvantageScale::group_std : AdvantageScale::none;
    expect_groups(each, GroupAdvantage{.scale = scale, .epsilon = epsilon},
                  scaled ? 1 / (1 + epsilon) : 1);
  }
}

TEST(VerlAdvantages, Rloo) {
  const GroupAdvantage rloo{.baseline = AdvantageBaseline::leave_one_out,
                            .scale = AdvantageScale::none};
  ASSERT_EQ(recorded("rloo").size(), 1u);
  expect_groups(recorded("rloo")[0], rloo, 1);
  ASSERT_EQ(recorded("rloo_vectorized").size(), 1u);
  expect_groups(recorded("rloo_vectorized")[0], rloo, 0);
}

TEST(VerlAdvantages, Opo) {
  ASSERT_EQ(recorded("opo").size(), 1u);
  expect_groups(recorded("opo")[0], Opo{}, 1);
}

// One reward an answer, at its last slot; the advantage of its first token.
TEST(VerlAdvantages, GrpoPassk) {
  const std::vector<Json> cases = recorded("grpo_passk");
  ASSERT_EQ(cases.size(), 3u);
  for (const Json& each : cases) {
    const auto ids = each["ids"].get<std::vector<int64_t>>();
    const bool scaled = each["settings"]["norm_adv_by_std_in_grpo"];
    const GroupAdvantage rule{.baseline = AdvantageBaseline::best_of_others,
                              .scale = scaled ? AdvantageScale::group_std : AdvantageScale::none,
                              .epsilon = each["settings"].value("epsilon", 1e-6)};
    Doubles rewards, advantages(ids.size());
    for (const Json& row : each["token_level_rewards"]) rewards.push_back(row.back());
    group_advantage(rewards.data(), ids.data(), int64_t(ids.size()), rule, advantages.data());
    int best = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      const double expected = each["advantages"][i][0];
      EXPECT_NEAR(advantages[i], expected, 1e-12 * std::abs(expected)) << i;
      best += expected != 0;
    }
    EXPECT_EQ(best, 2);  // one group is of equal rewards
  }
}

}  // namespace
}  // namespace tether
