#pragma once

#include <cstdint>

#include "batch.h"
#include "macros.h"

namespace tether::cuda {

// A padded row whose tokens do not wait for one another is cut into pieces of so many, a team for
// each.
inline constexpr int64_t kPieceTokens = 2048;

inline int64_t pieces_of_rows(const RowLayout& layout) {
  const bool whole = layout.packed() || layout.columns == 0;
  return whole ? 1 : (layout.columns + kPieceTokens - 1) / kPieceTokens;
}

// The tokens of a row that a team works on.
struct TokenPiece {
  int64_t row, begin, end;

  // Piece `i` of all rows.
  TETHER_TEAM TokenPiece(const RowLayout& layout, int64_t i, int64_t pieces) {
    row = pieces == 1 ? i : i / pieces;
    const int64_t length = layout.length(row);
    begin = (i - row * pieces) * kPieceTokens;
    end = pieces == 1 || begin + kPieceTokens > length ? length : begin + kPieceTokens;
  }
};

}  // namespace tether::cuda
