#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "examples/text2sql/questions.h"
#include "examples/text2sql/sandbox.h"

namespace text2sql {

class Task;

enum class Instances { reward, evaluation };

// Says whether a query answers a question, by running it. One Judge per thread.
class Judge {
 public:
  Judge(const Task& task, Instances which);
  explicit Judge(const std::vector<std::string>& instance_scripts);

  // Right on every instance. Any text may be judged; a refused, wrong or endless query is not
  // correct. Verdicts are remembered by (gold_sql, sql).
  bool correct(const Question& question, std::string_view sql);

  // The number of instances, at most `enough`, on which the query's result is informative.
  int informative_instances(std::string_view sql, int enough);

  // Why correct() would say no: "no such column: ..", "wrong result on instance 3"; empty when the
  // query is correct. Not remembered.
  std::string complaint(const Question& question, std::string_view sql);

  size_t instances() const { return sandboxes_.size(); }

 private:
  struct Gold {
    bool ordered = false;
    std::vector<ResultSet> results;                  // by instance
    std::unordered_map<std::string, bool> verdicts;  // by sql
  };

  Gold& gold(const std::string& gold_sql);

  std::vector<Sandbox> sandboxes_;
  std::unordered_map<std::string, Gold> golds_;
};

}  // namespace text2sql
