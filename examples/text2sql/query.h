#pragma once

#include <string>
#include <vector>

namespace text2sql {

// The shape of every gold query, and of its sloppy copies.
struct Query {
  struct Output {
    std::string column;             // "student.age" or "*"
    std::string aggregate = {};     // "", COUNT, AVG, MAX, MIN, SUM
    bool distinct = false;          // COUNT(DISTINCT student.id)
    bool divided_by_count = false;  // SUM(student.age) / COUNT(*)
  };
  struct Join {
    std::string table;
    std::string left;   // the column of the tables before it
    std::string right;  // the column of `table`
  };
  struct Condition {
    std::string column;
    std::string relation;  // = > <
    std::string value;     // 25 or 'Physics'
  };

  bool distinct = false;
  std::vector<Output> outputs = {};
  std::string from = {};
  std::vector<Join> joins = {};
  std::vector<Condition> conditions = {};
  std::string connective = "AND";
  std::string group_by = {};
  std::string order_by = {};
  bool descending = false;
  int limit = 0;  // 0: none

  int tables() const { return 1 + static_cast<int>(joins.size()); }
  std::string sql() const;
};

}  // namespace text2sql
