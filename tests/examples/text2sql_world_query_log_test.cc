#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <set>
#include <string>
#include <string_view>

#include "examples/text2sql/judge.h"
#include "examples/text2sql/query_log.h"
#include "examples/text2sql/sandbox.h"
#include "tests/examples/text2sql_world.h"

namespace text2sql {
namespace {

TEST(Habits, EveryHabitBreaksSomething) {
  Judge judge(task(), Instances::evaluation);
  Random random(2);
  for (const Habit& habit : habits()) {
    int applied = 0, broken = 0;
    while (applied < 150) {
      const auto& all = task().grammar().compositions();
      const auto [text, gold] = task().grammar().draw(all[random.below(all.size())], random);
      if (!habit.applies(gold) || judge.informative_instances(gold.sql(), 2) < 2) continue;
      Query sloppy = gold;
      habit.apply(sloppy);
      EXPECT_NE(sloppy.sql(), gold.sql()) << habit.name;
      EXPECT_EQ(judge.complaint({.gold_sql = sloppy.sql()}, sloppy.sql()), "") << habit.name;
      ++applied;
      broken += !judge.correct({.gold_sql = gold.sql()}, sloppy.sql());
    }
    std::printf("%s: wrong in %d of %d\n", std::string(habit.name).c_str(), broken, applied);
    EXPECT_GT(broken, applied / 4) << habit.name;
  }
}

TEST(Habits, ChangeWhatTheySay) {
  const auto changed = [](std::string_view name, Query query) {
    for (const Habit& habit : habits()) {
      if (habit.name == name && habit.applies(query)) habit.apply(query);
    }
    return query.sql();
  };
  const Query query = {.distinct = true,
                       .outputs = {{.column = "student.name"}, {.column = "student.age"}},
                       .from = "student",
                       .joins = {{"dept", "student.dept_id", "dept.id"}},
                       .conditions = {{"student.age", ">", "20"}, {"dept.name", "=", "'Law'"}},
                       .order_by = "student.age",
                       .descending = true,
                       .limit = 3};
  const std::string rest = " FROM student JOIN dept ON student.dept_id = dept.id WHERE ";
  const std::string order = " ORDER BY student.age DESC LIMIT 3";
  const std::string where = "student.age > 20 AND dept.name = 'Law'";
  EXPECT_EQ(query.sql(), "SELECT DISTINCT student.name, student.age" + rest + where + order);
  EXPECT_EQ(changed("missing DISTINCT", query),
            "SELECT student.name, student.age" + rest + where + order);
  EXPECT_EQ(changed(">= for >", query), "SELECT DISTINCT student.name, student.age" + rest +
                                            "student.age >= 20 AND dept.name = 'Law'" + order);
  EXPECT_EQ(changed("DESC forgotten", query), "SELECT DISTINCT student.name, student.age" + rest +
                                                  where + " ORDER BY student.age LIMIT 3");
  EXPECT_EQ(changed("join on id", query),
            "SELECT DISTINCT student.name, student.age FROM student JOIN dept ON student.id ="
            " dept.id WHERE " +
                where + order);
  EXPECT_EQ(changed("OR for AND", query), "SELECT DISTINCT student.name, student.age" + rest +
                                              "student.age > 20 OR dept.name = 'Law'" + order);
  EXPECT_EQ(changed("second column forgotten", query),
            "SELECT DISTINCT student.name" + rest + where + order);
  const Query mean = {
      .outputs = {{.column = "dept.name"}, {.column = "student.age", .aggregate = "AVG"}},
      .from = "student",
      .group_by = "dept.name"};
  EXPECT_EQ(changed("SUM / COUNT for AVG", mean),
            "SELECT dept.name, SUM(student.age) / COUNT(*) FROM student GROUP BY dept.name");
  EXPECT_EQ(changed("second column forgotten", mean), mean.sql());
}

TEST(Habits, HitWithTheirProbability) {
  const Query bare = {.outputs = {{.column = "*", .aggregate = "COUNT"}}, .from = "student"};
  const Query descending = {.outputs = {{.column = "student.name"}},
                            .from = "student",
                            .order_by = "student.age",
                            .descending = true,
                            .limit = 1};
  Random random(4);
  constexpr int kDraws = 20000;
  int forgotten = 0, slips = 0;
  for (int i = 0; i < kDraws; ++i) {
    EXPECT_EQ(logged(bare, random).sql(), bare.sql());  // nothing to get wrong
    const Query query = logged(descending, random);
    forgotten += !query.descending;
    slips += query.limit != 1 || query.outputs[0].column != "student.name";
  }
  EXPECT_NEAR(forgotten / double{kDraws}, 0.6, 4 * std::sqrt(0.6 * 0.4 / kDraws));
  EXPECT_NEAR(slips / double{kDraws}, 0.05, 4 * std::sqrt(0.05 * 0.95 / kDraws));
}

TEST(Habits, ASlipStillRuns) {
  Sandbox sandbox(task().instance_scripts(Instances::reward)[0]);
  Random random(6);
  std::set<std::string> changed;
  for (const Composition& each : task().grammar().compositions()) {
    const Query gold = task().grammar().draw(each, random).query;
    Query query = gold;
    slip(query, random);
    EXPECT_TRUE(sandbox.run(query.sql())) << query.sql() << ": " << sandbox.error();
    if (query.sql() != gold.sql()) changed.insert(query.sql());
  }
  EXPECT_GT(changed.size(), task().compositions() * 9 / 10);
}

}  // namespace
}  // namespace text2sql
