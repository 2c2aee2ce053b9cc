#include "examples/text2sql/judge.h"

#include <optional>
#include <stdexcept>
#include <utility>

#include "examples/text2sql/task.h"

namespace text2sql {

Judge::Judge(const Task& task, Instances which) : Judge(task.instance_scripts(which)) {}

Judge::Judge(const std::vector<std::string>& instance_scripts) {
  for (const std::string& script : instance_scripts) sandboxes_.emplace_back(script);
}

Judge::Gold& Judge::gold(const std::string& gold_sql) {
  const auto [place, is_new] = golds_.try_emplace(gold_sql);
  Gold& gold = place->second;
  if (!is_new) return gold;
  gold.ordered = gold_sql.find("ORDER BY") != std::string::npos;
  for (Sandbox& sandbox : sandboxes_) {
    std::optional<ResultSet> result = sandbox.run(gold_sql);
    if (!result) {
      golds_.erase(place);
      throw std::invalid_argument("Judge: gold_sql must run, got: " + sandbox.error());
    }
    gold.results.push_back(std::move(*result));
  }
  return gold;
}

std::string Judge::complaint(const Question& question, std::string_view sql) {
  const Gold& expected = gold(question.gold_sql);
  for (size_t i = 0; i < sandboxes_.size(); ++i) {
    const std::optional<ResultSet> result = sandboxes_[i].run(sql);
    if (!result) return sandboxes_[i].error();
    if (!same_result(expected.results[i], *result, expected.ordered)) {
      return "wrong result on instance " + std::to_string(i + 1);
    }
  }
  return {};
}

bool Judge::correct(const Question& question, std::string_view sql) {
  if (sql.size() > SandboxLimits{}.sql_bytes) return false;
  Gold& expected = gold(question.gold_sql);
  const auto [verdict, is_new] = expected.verdicts.try_emplace(std::string(sql), false);
  if (is_new) verdict->second = complaint(question, sql).empty();
  return verdict->second;
}

int Judge::informative_instances(std::string_view sql, int enough) {
  int count = 0;
  for (Sandbox& sandbox : sandboxes_) {
    if (count == enough) break;
    const std::optional<ResultSet> result = sandbox.run(sql);
    count += result && informative(*result) ? 1 : 0;
  }
  return count;
}

}  // namespace text2sql
