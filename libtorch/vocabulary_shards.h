#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "logits_rows.h"
#include "token_logps_types.h"

// token_logps of a shard of the vocabulary: what ranks send to each other.

namespace tether::detail {

// Throws unless it is one of these logits, or none.
void check_shard(const VocabularyShard& shard, const at::Tensor& logits);

// `statistics` of this rank, whose logits have so many columns, become those of all.
void gather_shards(const VocabularyShard& shard, int64_t columns, const at::Tensor& targets,
                   const at::Tensor& support, const RowOptions& options,
                   const at::Tensor& statistics);

// The same of states, which kernels have left, and of what has a gradient. Nothing waits to refuse
// ranks that do not fit together: all rows are NaN.
void gather_on_device(const VocabularyShard& shard, int64_t columns, const at::Tensor& targets,
                      const at::Tensor& support, const RowOptions& options,
                      const RowsOnDevice& rows);

}  // namespace tether::detail
