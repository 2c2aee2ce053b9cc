#pragma once

#include <cstdint>

#include "../../core/batch.h"
#include "../../core/macros.h"

namespace tether::cuda {

// What the tokens of a row or of a turn share where the ratio is their segment's (rl/level.h).
struct SegmentRatio {
  float logp = 0, log_ratio = 0;
  float share = 1;  // 1 / n: of a token in the metrics of the ratio
};

// The turns of a batch, in arrays like the tokens, padding too. What is known of a turn stands at
// the slot at which it begins.
struct TurnTable {
  int64_t* begins = nullptr;  // of each slot the column at which its turn begins, -1 before all
  SegmentRatio* ratios = nullptr;  // of turns
  float* sums = nullptr;     // what is to be added up of tokens, then what it came to of turns
  double* counts = nullptr;  // of rows: turns with tokens

  TETHER_INLINE explicit operator bool() const { return begins != nullptr; }

  TETHER_INLINE static int64_t slot(const RowLayout& layout, int64_t row, int64_t column) {
    return (layout.packed() ? layout.offset(row) : row * layout.columns) + column;
  }
  // The slot of the turn that a token is in.
  TETHER_INLINE int64_t turn_of(const RowLayout& layout, int64_t row, int64_t column) const {
    const int64_t first = slot(layout, row, 0);
    return first + begins[first + column];
  }
};

}  // namespace tether::cuda
