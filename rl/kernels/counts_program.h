#pragma once

#include <cstdint>

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

}  // namespace tether::cuda
