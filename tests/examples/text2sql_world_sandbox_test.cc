#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "examples/text2sql/judge.h"
#include "examples/text2sql/random.h"
#include "examples/text2sql/sandbox.h"
#include "examples/text2sql/schema.h"
#include "tests/examples/text2sql_world.h"

namespace text2sql {
namespace {

using testing::HasSubstr;

const std::string kScript =
    "CREATE TABLE student(id INTEGER PRIMARY KEY, name TEXT, age INTEGER, gpa REAL);"
    "INSERT INTO student VALUES(7, 'Ada', 20, 3.5), (3, 'Bob', 31, 2.5), (9, 'Cy', NULL, 0.1);";

std::string repeated(const std::string& text, int times, const std::string& separator = "") {
  std::string result;
  for (int i = 0; i < times; ++i) result += (i == 0 ? "" : separator) + text;
  return result;
}

ResultSet run(const std::string& sql) {
  Sandbox sandbox(kScript);
  const auto result = sandbox.run(sql);
  EXPECT_TRUE(result) << sql << ": " << sandbox.error();
  return result.value_or(ResultSet{});
}

std::string refusal(const std::string& sql) {
  Sandbox sandbox(kScript);
  EXPECT_FALSE(sandbox.run(sql)) << sql;
  return sandbox.error();
}

TEST(Sandbox, ReturnsRowsWithTheirTypes) {
  const ResultSet result = run("SELECT id, name, gpa, age FROM student ORDER BY id DESC LIMIT 1");
  EXPECT_EQ(result.columns, 4u);
  const std::vector<Cell> cells = {int64_t{9}, std::string("Cy"), 0.1, std::monostate{}};
  EXPECT_EQ(result.cells, cells);
}

TEST(Sandbox, AcceptsASemicolonAndBlanksAtTheEnd) {
  EXPECT_EQ(run("SELECT 1").rows(), 1u);
  EXPECT_EQ(run(" SELECT 1 ;\n ").rows(), 1u);
}

TEST(Sandbox, SaysWhyAQueryIsRefused) {
  EXPECT_EQ(refusal("SELECT grade FROM student"), "no such column: grade");
  EXPECT_EQ(refusal("SELECT \"Ada\" FROM student"), "no such column: Ada");
  EXPECT_EQ(refusal(""), "there is no statement");
  EXPECT_EQ(refusal(" ;"), "there is no statement");
  EXPECT_EQ(refusal("-- SELECT 1"), "there is no statement");
  EXPECT_EQ(refusal("/* SELECT 1 */"), "there is no statement");
  EXPECT_EQ(refusal("SELECT 1; SELECT 2"), "there is text after the statement");
  EXPECT_EQ(refusal("SELECT 1; -- more"), "there is text after the statement");
  EXPECT_EQ(refusal(std::string("SELECT 1\0, 2", 11)), "the query has a zero byte");
  EXPECT_EQ(refusal("EXPLAIN SELECT 1"), "the statement is not a plain SELECT");
  EXPECT_EQ(refusal("SELECT x'00'"), "a blob in the result");
  EXPECT_EQ(refusal("SELECT ?1"), "variable number must be between ?1 and ?0");
  EXPECT_EQ(refusal("SELECT '" + repeated("x", 320) + "'"), "the query is too long");
  EXPECT_EQ(refusal("WITH a AS (SELECT 1) SELECT * FROM a"), "WITH is not allowed");
  EXPECT_EQ(refusal("with a as (select 1) select * from a"), "WITH is not allowed");
  EXPECT_EQ(refusal("SELECT (SELECT (SELECT 1))"), "too many SELECTs");
  EXPECT_EQ(refusal("select(Select(select+1))"), "too many SELECTs");
  EXPECT_EQ(run("SELECT 1 AS withdrawn, 2 AS selected, (SELECT 3) AS select_me").columns, 3u);
}

TEST(Sandbox, OnlyReads) {
  for (const char* sql : {"DELETE FROM student",
                          "INSERT INTO student VALUES(1, 'Eve', 1, 1)",
                          "UPDATE student SET age = 1",
                          "DROP TABLE student",
                          "CREATE TABLE x(y)",
                          "CREATE TEMP TABLE x AS SELECT 1",
                          "ATTACH 'x.db' AS x",
                          "PRAGMA query_only = OFF",
                          "PRAGMA table_info(student)",
                          "BEGIN",
                          "SAVEPOINT x",
                          "VACUUM",
                          "REINDEX",
                          "ANALYZE",
                          "SELECT * FROM sqlite_master",
                          "SELECT * FROM sqlite_schema",
                          "SELECT 1 FROM pragma_table_list",
                          "SELECT load_extension('x')",
                          "SELECT group_concat(name) FROM student",
                          "SELECT name FROM student WHERE name LIKE '%a'",
                          "SELECT name FROM student WHERE name GLOB '*a'",
                          "SELECT random()",
                          "SELECT date('now')"}) {
    EXPECT_THAT(refusal(sql), testing::AnyOf(HasSubstr("not authorized"), HasSubstr("prohibited"),
                                             HasSubstr("not a plain SELECT")))
        << sql;
  }
  Sandbox sandbox(kScript);
  sandbox.run("DELETE FROM student");
  EXPECT_EQ(sandbox.run("SELECT id FROM student")->rows(), 3u);
}

TEST(Sandbox, ALimitEndsAQueryAndNothingElse) {
  const std::string cross =
      " FROM student a, student b, student c, student d, student e,"
      " student f, student g, student h, student i, student j, student k";
  Sandbox sandbox(kScript);
  EXPECT_FALSE(sandbox.run("SELECT COUNT(*)" + cross));
  EXPECT_EQ(sandbox.error(), "the query takes too many steps");
  EXPECT_FALSE(sandbox.run("SELECT 1" + cross));
  EXPECT_EQ(sandbox.error(), "too many rows");
  EXPECT_FALSE(sandbox.run("SELECT '" + repeated("x", 100) + "'" + cross));
  EXPECT_EQ(sandbox.error(), "the result is too large");
  EXPECT_TRUE(sandbox.run("SELECT COUNT(*) FROM student"));
}

TEST(Sandbox, LimitsLengthsWidthsAndDepths) {
  const std::string word = "'" + repeated("x", 60) + "'";
  Sandbox sandbox(kScript, {.value_bytes = 100, .nesting = 10, .columns = 3});
  EXPECT_TRUE(sandbox.run("SELECT name || " + word + " FROM student"));
  EXPECT_FALSE(sandbox.run("SELECT name || " + word + " || " + word + " FROM student"));
  EXPECT_EQ(sandbox.error(), "string or blob too big");
  EXPECT_TRUE(sandbox.run("SELECT 1, 2, 3"));
  EXPECT_FALSE(sandbox.run("SELECT 1, 2, 3, 4"));
  EXPECT_EQ(sandbox.error(), "too many columns in result set");
  EXPECT_TRUE(sandbox.run("SELECT " + repeated("1", 9, " + ")));
  EXPECT_FALSE(sandbox.run("SELECT " + repeated("1", 12, " + ")));
  EXPECT_EQ(sandbox.error(), "Expression tree is too large (maximum depth 10)");
}

TEST(Sandbox, StepsAreCountedNotTimed) {
  const auto verdict = [](int steps) {
    Sandbox sandbox(kScript, {.virtual_machine_steps = steps});
    return sandbox
        .run(
            "SELECT COUNT(*) FROM student a, student b, student c, student d, student e,"
            " student f, student g")
        .has_value();
  };
  int enough = 1000;
  while (!verdict(enough)) enough += 1000;
  EXPECT_GT(enough, 3000);  // 3^7 = 2187 rows at two steps or more
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(verdict(enough));
    EXPECT_FALSE(verdict(enough - 1000));
  }
}

TEST(Sandbox, RejectsABrokenScript) {
  EXPECT_THROW(
      {
        try {
          Sandbox sandbox("CREATE TABLE");
        } catch (const std::invalid_argument& error) {
          EXPECT_STREQ(error.what(), "Sandbox: script must be valid SQL, got: incomplete input");
          throw;
        }
      },
      std::invalid_argument);
}

ResultSet rows(size_t columns, std::vector<Cell> cells) { return {columns, std::move(cells)}; }
Cell integer(int64_t value) { return value; }
Cell text(const char* value) { return std::string(value); }

TEST(SameResult, ComparesNumbersByValue) {
  EXPECT_TRUE(same_result(rows(1, {integer(2)}), rows(1, {2.0}), true));
  EXPECT_TRUE(same_result(rows(1, {2.0}), rows(1, {2.0 + 1e-9}), true));
  EXPECT_FALSE(same_result(rows(1, {2.0}), rows(1, {2.0 + 1e-8}), true));
  EXPECT_TRUE(same_result(rows(1, {-2.0}), rows(1, {-2.0 - 1e-9}), true));
  EXPECT_FALSE(same_result(rows(1, {2.0}), rows(1, {-2.0}), true));
  EXPECT_FALSE(same_result(rows(1, {2.0}), rows(1, {HUGE_VAL}), true));
  EXPECT_FALSE(same_result(rows(1, {integer((int64_t{1} << 60) + 1)}),
                           rows(1, {integer(int64_t{1} << 60)}), true));
  EXPECT_FALSE(same_result(rows(1, {integer(2)}), rows(1, {text("2")}), true));
  EXPECT_FALSE(same_result(rows(1, {integer(0)}), rows(1, {std::monostate{}}), true));
  EXPECT_TRUE(same_result(rows(1, {std::monostate{}}), rows(1, {std::monostate{}}), true));
}

TEST(SameResult, IsAMultisetUnlessOrdered) {
  const ResultSet gold = rows(2, {integer(1), text("a"), integer(2), text("b")});
  const ResultSet swapped = rows(2, {integer(2), text("b"), integer(1), text("a")});
  EXPECT_TRUE(same_result(gold, swapped, false));
  EXPECT_FALSE(same_result(gold, swapped, true));
  EXPECT_FALSE(same_result(gold, rows(2, {integer(1), text("b"), integer(2), text("a")}), false));
  EXPECT_FALSE(same_result(rows(1, {integer(1), integer(1), integer(2)}),
                           rows(1, {integer(1), integer(2), integer(2)}), false));
  EXPECT_FALSE(same_result(rows(1, {integer(1)}), rows(1, {integer(1), integer(1)}), false));
}

TEST(SameResult, NeedsTheSameNumberOfColumns) {
  EXPECT_FALSE(
      same_result(rows(2, {integer(1), integer(1)}), rows(1, {integer(1), integer(1)}), false));
  EXPECT_FALSE(same_result(rows(1, {}), rows(2, {}), false));
  EXPECT_TRUE(same_result(rows(2, {}), rows(2, {}), false));
}

TEST(Informative, NeedsMoreThanZerosAndNulls) {
  EXPECT_FALSE(informative(rows(1, {})));
  EXPECT_FALSE(informative(rows(2, {integer(0), std::monostate{}})));
  EXPECT_FALSE(informative(rows(1, {0.0})));
  EXPECT_TRUE(informative(rows(2, {integer(0), integer(1)})));
  EXPECT_TRUE(informative(rows(1, {text("Ada")})));
}

std::vector<std::string> hostile_queries() {
  const std::string many = " FROM student a, student b, student c, student d, enrol e, enrol f";
  const std::string bytes200 = "'" + repeated("x", 200) + "'";
  return {
      "",
      ";",
      "/* nothing */",
      "-- nothing",
      "/*",
      "'",
      std::string(1, '\0'),
      std::string("SELECT 1\0SELECT 2", 17),
      "\xff\xfe\x80",
      "SELECT '\xff\xc0\x80'",
      "SELECT \xf0\x9f\x98\x80 FROM student",
      repeated("SELECT ", 150000),
      repeated("x", 1 << 20),
      "SELECT '" + repeated("x", 1 << 20) + "'",
      "SELECT " + repeated("(", 150) + "1" + repeated(")", 150),
      "SELECT " + repeated("NOT ", 75) + "1",
      "SELECT " + repeated("-", 300) + "1",
      "SELECT " + repeated("1+", 150) + "1",
      "SELECT 1" + repeated(" UNION SELECT 1", 20),
      "SELECT 1 FROM " + repeated("dept", 60, ","),
      "SELECT * FROM " + repeated("student", 37, ","),
      "SELECT 1 FROM dept" + repeated(" NATURAL JOIN dept", 15),
      "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT COUNT(*) FROM x",
      "WITH a AS (SELECT 1),b AS (SELECT 1 FROM a,a),c AS (SELECT 1 FROM b,b) SELECT * FROM c",
      "SELECT COUNT(*)" + many,
      "SELECT a.name" + many + " ORDER BY a.name || b.name || c.name || d.name",
      "SELECT DISTINCT " + bytes200 + " || a.id || b.id || e.grade || f.grade" + many,
      "SELECT COUNT(DISTINCT " + bytes200 + " || a.id || b.id || e.grade || f.grade)" + many,
      "SELECT " + bytes200 + " || a.id || b.id, COUNT(*)" + many + " GROUP BY 1",
      "SELECT MAX(a.id) OVER (ORDER BY b.id, e.grade || f.grade)" + many,
      "SELECT group_concat(a.name || b.name)" + many,
      "SELECT name FROM student WHERE (SELECT COUNT(*)" + many + ") > id",
      "SELECT 1 FROM student WHERE " + bytes200 + " LIKE '" + repeated("%x", 40) + "y'",
      "SELECT 1 FROM student WHERE " + bytes200 + " GLOB '" + repeated("*x", 40) + "y'",
      "SELECT replace(" + bytes200 + ", 'x', " + "'" + repeated("y", 100) + "')",
      "SELECT printf('%1000000000d', 1)",
      "SELECT format('%.*c', 1000000000, 'x')",
      "SELECT zeroblob(1000000000)",
      "SELECT randomblob(1000000000)",
      "SELECT hex(zeroblob(100000000))",
      "SELECT quote(zeroblob(100000000))",
      "SELECT char(120, 120)",
      "SELECT substr('x', 1, 1)",
      "SELECT json_array(1)",
      "SELECT writefile('x', 'y')",
      "SELECT load_extension('x')",
      "SELECT * FROM generate_series(1, 1000000000)",
      "SELECT * FROM json_each('[1]')",
      "SELECT b IN(" + repeated("b", 42, ",") + ")a FROM(SELECT id IN(" + repeated("id", 28, ",") +
          ")b FROM dept)WHERE a IN(" + repeated("a", 42, ",") + ")",
      "SELECT name FROM student LIMIT -1",
      "SELECT 9223372036854775807 + 1",
      "SELECT abs(-9223372036854775807 - 1)",
      "SELECT 1e999",
      "ATTACH ':memory:' AS other",
      "PRAGMA hard_heap_limit = 1",
      "PRAGMA writable_schema = ON",
      "DELETE FROM student",
      "DROP TABLE student",
      "UPDATE student SET age = 1",
      "SELECT COUNT(*) FROM student; DROP TABLE student",
      "CREATE TABLE x(y)",
      "VACUUM INTO 'x'",
      "BEGIN EXCLUSIVE",
  };
}

TEST(Judge, AHostileQueryIsWrongInBoundedTimeAndMemory) {
  Judge judge({instance_script(1), instance_script(2), instance_script(3)});
  const Question question = {.gold_sql = "SELECT COUNT(*) + 1 FROM student"};
  ASSERT_TRUE(judge.correct(question, "SELECT 25"));
  double slowest = 0;
  sqlite3_int64 largest = 0;
  for (const std::string& sql : hostile_queries()) {
    sqlite3_memory_highwater(1);
    const sqlite3_int64 before = sqlite3_memory_used();
    const std::clock_t start = std::clock();
    EXPECT_FALSE(judge.correct(question, sql)) << sql.substr(0, 200);
    const double seconds = cpu_seconds(start, std::clock());
    const sqlite3_int64 bytes = sqlite3_memory_highwater(0) - before;
    EXPECT_LT(seconds, 0.25) << sql.substr(0, 200);
    EXPECT_LT(bytes, 32 << 20) << sql.substr(0, 200);
    slowest = std::max(slowest, seconds);
    largest = std::max(largest, bytes);
  }
  std::printf("%zu hostile queries: slowest %.1f ms, most memory %.1f MB\n",
              hostile_queries().size(), slowest * 1e3, static_cast<double>(largest) / 1e6);
  EXPECT_TRUE(judge.correct(question, "SELECT 25"));
}

TEST(Judge, RemembersVerdicts) {
  Judge judge({instance_script(1)});
  const Question question = {.gold_sql = "SELECT name FROM student"};
  const std::string slow = "SELECT COUNT(*) FROM student a, student b, student c, student d";
  const auto seconds = [&](int times, bool different) {
    const std::clock_t start = std::clock();
    for (int i = 0; i < times; ++i) {
      const std::string suffix = different ? " LIMIT " + std::to_string(i) : "";
      EXPECT_FALSE(judge.correct(question, slow + suffix));
    }
    return cpu_seconds(start, std::clock());
  };
  EXPECT_LT(5 * seconds(300, false), seconds(300, true));
}

TEST(Judge, RandomBytesAreWrong) {
  Judge judge({instance_script(1)});
  const Question question = {.gold_sql = "SELECT name FROM student"};
  Random random(5);
  for (int i = 0; i < 3000; ++i) {
    std::string sql = random.chance(0.5) ? "SELECT " : "";
    for (size_t length = random.below(60); length > 0; --length) {
      sql += static_cast<char>(random.below(256));
    }
    EXPECT_FALSE(judge.correct(question, sql)) << sql;
  }
}

TEST(Judge, NeedsTheRightResultOnEveryInstance) {
  const auto table = [](const std::string& ages) {
    return "CREATE TABLE student(name TEXT, age INTEGER); INSERT INTO student VALUES " + ages + ";";
  };
  Judge judge({table("('Ada', 20)"), table("('Ada', 20), ('Bob', 30)")});
  const Question list = {.gold_sql = "SELECT name FROM student"};
  EXPECT_TRUE(judge.correct(list, "SELECT name FROM student ORDER BY age DESC"));
  EXPECT_FALSE(judge.correct(list, "SELECT name FROM student WHERE age = 20"));
  EXPECT_FALSE(judge.correct(list, "SELECT name FROM student WHERE age = 20"));  // remembered
  EXPECT_EQ(judge.complaint(list, "SELECT name FROM student WHERE age = 20"),
            "wrong result on instance 2");
  EXPECT_EQ(judge.complaint(list, "SELECT id FROM student"), "no such column: id");
  EXPECT_EQ(judge.complaint(list, "SELECT name FROM student"), "");
  const Question ordered = {.gold_sql = "SELECT name FROM student ORDER BY age"};
  EXPECT_TRUE(judge.correct(ordered, "SELECT name FROM student ORDER BY name"));
  EXPECT_FALSE(judge.correct(ordered, "SELECT name FROM student ORDER BY age DESC"));
  EXPECT_EQ(judge.informative_instances("SELECT COUNT(*) FROM student WHERE age = 30", 2), 1);
  EXPECT_EQ(judge.informative_instances("SELECT COUNT(*) FROM student", 1), 1);
}

TEST(Judge, RejectsAGoldQueryThatDoesNotRun) {
  Judge judge({kScript});
  const auto judged = [&judge] { return judge.correct({.gold_sql = "SELECT x"}, "SELECT 1"); };
  EXPECT_THAT(judged, testing::ThrowsMessage<std::invalid_argument>(
                          "Judge: gold_sql must run, got: no such column: x"));
  EXPECT_THAT(judged, testing::Throws<std::invalid_argument>());
}

}  // namespace
}  // namespace text2sql
