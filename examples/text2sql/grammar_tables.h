#pragma once

#include <array>
#include <span>
#include <string_view>

// The words of the question grammar. In a phrase, # stands for the value asked for; in a template
// $P students, $S student, $F the filters, $C a column, $A average, $B highest, $K a number,
// $G what to group by, $L what names a row.
namespace text2sql::tables {

struct Step {
  std::string_view table;
  std::string_view left;
  std::string_view right;
};

struct Filter {
  std::string_view name;
  std::string_view column;
  std::string_view relation;
  std::array<std::string_view, 3> phrases;  // "": fewer
  std::span<const Step> path = {};
  bool to_many = false;  // a row of the base table may match several times: DISTINCT
};

// From a base table, the projections follow: a list of names; every column alone, and beside the
// name; a count; every aggregate of every number; first and first k by every number, both ways;
// counts per category and per department; averages per category and per department.
struct Base {
  std::string_view table;
  std::string_view singular;
  std::string_view plural;
  std::string_view label;  // the column that names a row
  std::span<const std::string_view> numbers;
  std::string_view category;
  std::span<const std::string_view> aggregates;
  std::span<const Step> department;  // empty: no grouping by department
  std::span<const Filter> filters;
};

enum class Kind { list, column, named_column, count, aggregate, first, first_k, count_by, mean_by };

struct Wording {
  Kind kind;
  std::array<std::string_view, 3> templates;  // "": fewer
};

struct AggregateWords {
  std::string_view aggregate;
  std::array<std::string_view, 2> words;
};

std::span<const Base> bases();
std::span<const Wording> wordings();
std::span<const AggregateWords> aggregate_words();

}  // namespace text2sql::tables
