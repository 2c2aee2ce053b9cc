#include "examples/text2sql/query_log.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

namespace text2sql {
namespace {

using Condition = Query::Condition;
using Join = Query::Join;
using Output = Query::Output;

bool is_distinct(const Output& output) { return output.distinct; }
bool is_mean(const Output& output) { return output.aggregate == "AVG"; }
bool is_above(const Condition& condition) { return condition.relation == ">"; }
bool is_on_dept_id(const Join& join) {
  return join.left.ends_with(".dept_id") || join.right.ends_with(".dept_id");
}

bool has_distinct(const Query& query) {
  return query.distinct || std::any_of(query.outputs.begin(), query.outputs.end(), is_distinct);
}
void drop_distinct(Query& query) {
  query.distinct = false;
  for (Output& output : query.outputs) output.distinct = false;
}

bool has_above(const Query& query) {
  return std::any_of(query.conditions.begin(), query.conditions.end(), is_above);
}
void include_the_bound(Query& query) {
  for (Condition& condition : query.conditions) {
    if (is_above(condition)) condition.relation = ">=";
  }
}

bool is_descending(const Query& query) { return query.descending; }
void forget_descending(Query& query) { query.descending = false; }

bool has_mean(const Query& query) {
  return std::any_of(query.outputs.begin(), query.outputs.end(), is_mean);
}
void divide_sum_by_count(Query& query) {
  for (Output& output : query.outputs) output.divided_by_count |= is_mean(output);
}

bool joins_department(const Query& query) {
  return std::any_of(query.joins.begin(), query.joins.end(), is_on_dept_id);
}
void join_on_id(Query& query) {
  for (Join& join : query.joins) {
    for (std::string* column : {&join.left, &join.right}) {
      if (column->ends_with(".dept_id"))
        column->replace(column->find('.'), std::string::npos, ".id");
    }
  }
}

bool has_two_conditions(const Query& query) { return query.conditions.size() > 1; }
void say_or(Query& query) { query.connective = "OR"; }

bool has_second_column(const Query& query) {
  return query.outputs.size() > 1 && query.group_by.empty();
}
void forget_second_column(Query& query) { query.outputs.pop_back(); }

constexpr std::array<Habit, 7> kHabits = {{
    {"missing DISTINCT", 0.7, has_distinct, drop_distinct},
    {">= for >", 0.5, has_above, include_the_bound},
    {"DESC forgotten", 0.6, is_descending, forget_descending},
    {"SUM / COUNT for AVG", 0.6, has_mean, divide_sum_by_count},
    {"join on id", 0.4, joins_department, join_on_id},
    {"OR for AND", 0.5, has_two_conditions, say_or},
    {"second column forgotten", 0.5, has_second_column, forget_second_column},
}};

// Slips. Each returns false where it has nothing to change.
using Slip = bool (*)(Query&, Random&);

bool another_aggregate(Query& query, Random&) {
  const auto output = std::find_if(query.outputs.begin(), query.outputs.end(), [](const Output& o) {
    return !o.aggregate.empty() && o.column != "*";
  });
  if (output == query.outputs.end()) return false;
  output->aggregate = output->aggregate == "MAX" ? "MIN" : "MAX";
  output->distinct = output->divided_by_count = false;
  return true;
}

bool opposite_relation(Query& query, Random& random) {
  if (query.conditions.empty()) return false;
  std::string& relation = query.conditions[random.below(query.conditions.size())].relation;
  relation.assign(1, relation.starts_with('>') ? '<' : '>');
  return true;
}

bool lost_condition(Query& query, Random& random) {
  if (query.conditions.empty()) return false;
  const size_t lost = random.below(query.conditions.size());
  query.conditions.erase(query.conditions.begin() + static_cast<std::ptrdiff_t>(lost));
  return true;
}

bool wrong_digit(Query& query, Random& random) {
  for (Condition& condition : query.conditions) {
    char& digit = condition.value.back();
    if (digit < '0' || digit > '9') continue;
    digit = static_cast<char>('0' + (static_cast<size_t>(digit - '0') + 1 + random.below(9)) % 10);
    return true;
  }
  return false;
}

bool key_instead_of_column(Query& query, Random&) {
  std::string& column = query.outputs.front().column;
  if (column == "*" || column.ends_with(".id")) return false;
  column = query.from + ".id";
  return true;
}

bool one_row_more(Query& query, Random&) {
  if (query.limit == 0) return false;
  ++query.limit;
  return true;
}

constexpr std::array<Slip, 6> kSlips = {another_aggregate, opposite_relation,     lost_condition,
                                        wrong_digit,       key_instead_of_column, one_row_more};

}  // namespace

std::span<const Habit> habits() { return kHabits; }

void slip(Query& query, Random& random) {
  std::vector<Slip> slips(kSlips.begin(), kSlips.end());
  random.shuffle(slips);
  for (const Slip& each : slips) {
    if (each(query, random)) return;
  }
}

Query logged(Query query, Random& random) {
  for (const Habit& habit : habits()) {
    if (habit.applies(query) && random.chance(habit.probability)) habit.apply(query);
  }
  if (random.chance(kSlipProbability)) slip(query, random);
  return query;
}

}  // namespace text2sql
