#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/macros.h"
#include "../core/packed.h"
#include "final_logit.h"
#include "rows_cuda.h"

// How the programs on rows of logits (row_program.h) go through memory.

namespace tether::cuda {

// A row has one team in the forward pass, and in the backward pass one for each piece of it:
// kUnroll vectors a thread. The bits of a row depend on them, so that nothing about the machine or
// the call may.
inline constexpr int kForwardThreads = 512, kBackwardThreads = 256, kUnroll = 4;

template <class Stored, int kThreads = kBackwardThreads>
int pieces_of_row(int64_t vocabulary) {
  constexpr int64_t kPiece = int64_t{kThreads} * kUnroll * Packed<Stored>::kCount;
  return static_cast<int>((vocabulary + kPiece - 1) / kPiece);
}

inline constexpr float kLog2E = 0x1.715476p+0f;

// What the rows of a call share.
template <bool kCapped>
struct RowParameters {
  ConstLogits logits;
  const int64_t* targets;  // or null
  int64_t ignore_index;
  int64_t first_id, ids;   // of the columns, as in RowOptions, and of all shards together
  float multiplier;        // of x / T with respect to the final logit
  float slope_multiplier;  // with respect to the stored one, but for FinalLogit::slope
  rows::FinalLogit<float, kCapped> final_logit;

  TETHER_TEAM float k() const { return multiplier * kLog2E; }
  TETHER_TEAM bool is_shard() const { return ids > logits.vocabulary; }
  TETHER_TEAM bool is_ignored(int64_t row) const {
    return targets != nullptr && targets[row] == ignore_index;
  }
};

template <bool kCapped>
RowParameters<kCapped> row_parameters(const ConstLogits& logits, const int64_t* targets,
                                      const RowOptions& options) {
  return {logits,
          targets,
          options.ignore_index,
          options.first_id,
          options.ids > 0 ? options.ids : logits.vocabulary,
          static_cast<float>(rows::multiplier(options)),
          static_cast<float>(options.scale / options.temperature),
          rows::FinalLogit<float, kCapped>::of(options)};
}

// A row as vectors of 16 bytes, and single numbers before and after them. Where memory is not in
// one piece, or its two arrays are not aligned alike, all are single.
template <class Stored>
struct RowParts {
  static constexpr int kCount = Packed<Stored>::kCount;

  int64_t head, vectors, singles;

  // `shift`: bytes from the last multiple of 16 to the row.
  TETHER_TEAM RowParts(int64_t vocabulary, bool in_vectors, uintptr_t shift) {
    const auto misaligned = static_cast<int64_t>((16 - shift) % 16 / sizeof(Stored));
    head = !in_vectors || misaligned > vocabulary ? vocabulary : misaligned;
    vectors = (vocabulary - head) / kCount;
    singles = vocabulary - vectors * kCount;
  }
  TETHER_TEAM int64_t column_of_single(int64_t i) const {
    return i < head ? i : i + vectors * kCount;
  }
};

template <class Stored>
TETHER_TEAM uintptr_t shift_of(const Stored* row) {
  return reinterpret_cast<uintptr_t>(row) % 16;
}

template <class Stored, class Byte>
TETHER_TEAM auto* row_of(const BasicLogits<Byte>& logits, int64_t row) {
  using Element = std::conditional_t<std::is_const_v<Byte>, const Stored, Stored>;
  return static_cast<Element*>(logits.data) + logits.offset(row);
}

// Piece `piece` of `pieces`: its vectors, and its share of the single numbers.
template <class Team, class Stored>
struct RowPiece {
  static constexpr int64_t kVectors = int64_t{Team::kThreads} * kUnroll;
  static constexpr int kCount = Packed<Stored>::kCount;

  RowParts<Stored> parts;
  int piece, pieces;

  // visit(index of the vector, u) and visit(column) for what a thread owns.
  template <class Visit>
  TETHER_TEAM void for_each_vector(int thread, Visit visit) const {
    TETHER_UNROLL
    for (int u = 0; u < kUnroll; ++u) visit(piece * kVectors + u * Team::kThreads + thread, u);
  }
  template <class Visit>
  TETHER_TEAM void for_each_single(int thread, Visit visit) const {
    const int64_t step = int64_t{Team::kThreads} * pieces;
    for (int64_t i = int64_t{Team::kThreads} * piece + thread; i < parts.singles; i += step) {
      visit(parts.column_of_single(i));
    }
  }
  TETHER_TEAM bool owns(int thread, int64_t column) const {
    const int64_t in_body = column - parts.head;
    if (in_body >= 0 && in_body < parts.vectors * kCount) {
      const int64_t distance = in_body / kCount - piece * kVectors - thread;
      return distance >= 0 && distance < kVectors && distance % Team::kThreads == 0;
    }
    const int64_t single = column < parts.head ? column : column - parts.vectors * kCount;
    return single % (int64_t{Team::kThreads} * pieces) == int64_t{Team::kThreads} * piece + thread;
  }
};

}  // namespace tether::cuda
