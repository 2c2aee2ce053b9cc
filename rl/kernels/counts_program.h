#pragma once

#include <cstdint>

#include "../../core/elements.h"
#include "../../core/team.h"
#include "../aggregation.h"

namespace tether::cuda {

// Of all rows, from the tokens of each.
template <class Team>
TETHER_TEAM TermCounts counts_of_rows(const Team& team, const double* rows, int64_t count) {
  typename Team::template Local<TermCounts> local;
  team.each(local, [&](int thread, TermCounts& own) {
    for (int64_t row = thread; row < count; row += Team::kThreads) {
      own.tokens += rows[row];
      own.sequences += rows[row] > 0 ? 1 : 0;
    }
  });
  const auto all = team.template reduce<Sum>(
      local, [](const TermCounts& own) { return Several<double, 2>{own.tokens, own.sequences}; });
  return {.tokens = all.each[0], .sequences = all.each[1]};
}

// row_factor, and NaN where the count of the step that it divides by is no positive number: on a
// device that cannot be refused. For rows with tokens.
TETHER_TEAM double checked_row_factor(const Aggregation& aggregation, const TermCounts& step,
                                      double row_tokens) {
  const bool divides = aggregation.mode != Aggregation::Mode::token_sum;
  const bool by_tokens = aggregation.mode == Aggregation::Mode::token_mean;
  const double count = by_tokens ? step.tokens : step.sequences;
  return divides && !(count > 0) ? double{kNaN} : row_factor(aggregation, step, row_tokens);
}

}  // namespace tether::cuda
