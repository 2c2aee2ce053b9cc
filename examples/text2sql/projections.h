#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "examples/text2sql/grammar_tables.h"

namespace text2sql {

// What a question wants to know about the rows of a base table.
struct Projection {
  tables::Kind kind;
  std::string_view column = {};     // "age"
  std::string_view aggregate = {};  // AVG; for first and first_k MAX (descending) or MIN
  std::string_view group = {};      // "city" or "department"
  std::string name() const;         // "mean_by age AVG city"
};

std::vector<Projection> projections(const tables::Base& base);

}  // namespace text2sql
