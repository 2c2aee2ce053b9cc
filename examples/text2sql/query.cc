#include "examples/text2sql/query.h"

namespace text2sql {
namespace {

std::string text(const Query::Output& output) {
  const std::string argument = (output.distinct ? "DISTINCT " : "") + output.column;
  if (output.divided_by_count) return "SUM(" + argument + ") / COUNT(*)";
  return output.aggregate.empty() ? argument : output.aggregate + "(" + argument + ")";
}

}  // namespace

std::string Query::sql() const {
  std::string result = distinct ? "SELECT DISTINCT " : "SELECT ";
  for (size_t i = 0; i < outputs.size(); ++i) result += (i == 0 ? "" : ", ") + text(outputs[i]);
  result += " FROM " + from;
  for (const Join& join : joins) {
    result += " JOIN " + join.table + " ON " + join.left + " = " + join.right;
  }
  for (size_t i = 0; i < conditions.size(); ++i) {
    const Condition& condition = conditions[i];
    result += i == 0 ? " WHERE " : " " + connective + " ";
    result += condition.column + " " + condition.relation + " " + condition.value;
  }
  if (!group_by.empty()) result += " GROUP BY " + group_by;
  if (!order_by.empty()) result += " ORDER BY " + order_by + (descending ? " DESC" : "");
  if (limit > 0) result += " LIMIT " + std::to_string(limit);
  return result;
}

}  // namespace text2sql
