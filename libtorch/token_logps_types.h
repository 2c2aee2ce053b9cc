#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "../logits/statistics.h"

namespace tether {

// Where the vocabulary is split over ranks (tensor parallel): logits [..., V] hold the columns of
// the ids [first_id, first_id + V). Targets are ids of the whole, the same on every rank, as must
// be the gradients that arrive and the options, which is checked. Communication is the caller's. By
// kernels for CUDA (docs/cuda.md) ranks that do not fit together get NaN: nothing waits to tell.
struct VocabularyShard {
  int64_t first_id = 0;
  int64_t ids = 0;  // of all shards together; 0: not a shard
  // An all-gather of float64 on the device of the logits: [1 + N, 8] of this rank to
  // [shards, 1 + N, 8] of all, in the same order on every rank. Called once, in forward.
  std::function<at::Tensor(const at::Tensor& statistics)> gather = {};
};

struct TokenLogpsOptions {
  RowOptions row = {};      // but for sums, first_id and ids, which follow from the rest
  bool entropies = false;   // also return entropies
  bool statistics = false;  // also return what has no gradient, see TokenLogps

  // Where backward writes the gradient of logits, instead of fresh memory, which costs more than
  // the arithmetic: a tensor like logits that is used for nothing else until then, or logits
  // themselves. Then they hold their own gradient after backward, which runs once. The gradient
  // that autograd returns is this memory; the .grad of a leaf is a copy.
  at::Tensor gradient_buffer = {};

  VocabularyShard shard = {};
};

// Each like targets; undefined unless asked for.
struct TokenLogps {
  at::Tensor logps = {};
  at::Tensor entropies = {};
  // options.statistics, as constants:
  at::Tensor sum_of_squared_p = {};   // sum_v p_v^2
  at::Tensor mean_logits = {};        // of x, over the columns above -inf
  at::Tensor target_is_largest = {};  // bool: no other id is more probable
};

namespace detail {

// Of options with `row`, `entropies` and `statistics`.
template <class Options>
RowOptions row_options(const Options& options) {
  RowOptions row = options.row;
  row.sums = options.statistics  ? RowSums::all
             : options.entropies ? RowSums::entropy
                                 : RowSums::logp;
  row.first_id = row.ids = 0;
  return row;
}

}  // namespace detail

}  // namespace tether
