#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "statistics.h"
#include "support.h"

// Vocabularies split over ranks. Each rank sends a block of rows of 8 numbers: a header, which says
// what the others are of, then the statistics [N] of its own columns. All ranks read the same
// blocks, so that either all merge them or all refuse them.

namespace tether {

struct ShardHeader {
  double first_id, columns, ids;
  double sums;  // a RowSums
  std::array<double, std::tuple_size_v<decltype(RowOptions::fields())>> options;
  double targets;  // a hash of them, of ignore_index and of the kept ids
};
static_assert(sizeof(ShardHeader) == sizeof(RowStatistics));

// Of the rank whose logits have so many columns, for the targets of [rows]; kept: of
// support_statistics, else null.
ShardHeader shard_header(const RowOptions& options, int64_t columns, const int64_t* targets,
                         int64_t rows, const KeptIds* kept = nullptr);

// merged[r] of blocks [shards, 1 + rows, 8], in the order of the shards, which is thus part of the
// bits. Ignored rows stay what they are. Throws Error in words that begin with `function` unless
// the columns of the shards are [0, ids) without gap or overlap, and all ranks asked for the same
// of the same targets.
void merge_shards(std::string_view function, const RowStatistics* blocks, int64_t shards,
                  int64_t rows, const int64_t* targets, const RowOptions& options,
                  RowStatistics* merged);

}  // namespace tether
