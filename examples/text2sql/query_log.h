#pragma once

#include <span>
#include <string_view>

#include "examples/text2sql/query.h"
#include "examples/text2sql/random.h"

namespace text2sql {

// A systematic mistake of the people who wrote the query log.
struct Habit {
  std::string_view name;
  double probability;  // where it applies
  bool (*applies)(const Query&);
  void (*apply)(Query&);
};

// Missing DISTINCT .7, >= for > .5, DESC forgotten .6, SUM(x) / COUNT(*) for AVG .6, join on
// a.id = dept.id .4, OR for AND .5, second column forgotten .5.
std::span<const Habit> habits();

inline constexpr double kSlipProbability = 0.05;

// A random slip: another aggregate or relation, a lost condition, a wrong digit, a key for a
// column, one row more. Leaves a query alone where none of them fits (COUNT(*) without a
// condition).
void slip(Query& query, Random& random);

// The query as the log has it: every habit that applies hits with its probability; then perhaps a
// slip.
Query logged(Query query, Random& random);

}  // namespace text2sql
