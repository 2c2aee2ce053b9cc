#include "rl/dialects.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/error_message.h"

namespace tether {
namespace {

double option_of(PolicyObjective objective, std::string_view name) {
  double out = -1;
  for_each_option(objective, [&](std::string_view each, double value, const Range&) {
    if (each == name) out = value;
  });
  return out;
}

TEST(Dialects, AreLegalObjectives) {
  for (const Dialect& each : kDialects) {
    EXPECT_EQ(message([&] { check_objective("f", dialect("f", each.name)); }), "no error")
        << each.name;
  }
}

TEST(Dialects, HaveTheTrainersDefaults) {
  EXPECT_EQ(option_of(dialect("f", "verl.vanilla"), "dual_clip"), 3);
  EXPECT_EQ(option_of(dialect("f", "verl.cispo"), "ratio_low"), 0.8);
  EXPECT_EQ(option_of(dialect("f", "verl.dppo_kl"), "kl_mask.high"), 0.2);
  EXPECT_EQ(option_of(dialect("f", "trl.dapo"), "epsilon_high"), 0.2);
  EXPECT_EQ(dialect("f", "trl.luspo").aggregation.mode, Aggregation::Mode::sequence_mean_token_sum);
  EXPECT_EQ(dialect("f", "roll.topr").level, RatioLevel::token);
  ASSERT_EQ(dialect("f", "prime_rl.ipo").weights.size(), 1u);
  EXPECT_EQ(name_of(dialect("f", "prime_rl.ipo").weights[0]), "tv_band");
}

TEST(Dialects, AnUnknownOneListsTheOthers) {
  std::string known;
  for (const Dialect& each : kDialects) detail::append(known, each.name);
  EXPECT_EQ(message([&] { dialect("f", "verl.gspoo"); }),
            "f: dialect must be one of " + known + ", got \"verl.gspoo\"");
}

}  // namespace
}  // namespace tether
