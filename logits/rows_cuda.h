#pragma once

#include <cstdint>

#include "../core/cuda_stream.h"
#include "logits.h"
#include "statistics.h"

// logits/rows.h on a CUDA device: every array is in its memory, float32 where rows.h has double,
// the logits are float32, bfloat16 or float16. Calls return at once: they add kernels to `stream`,
// wait for nothing, allocate nothing and can be captured in a graph. No row depends on another one,
// nor on how many there are, and sums have one order: the same bits every run. (Columns are read 16
// bytes at a time: a row that begins at another place between two multiples of 16 bytes may have
// others.)
//
// As in rows.h a logit of -inf is a column that is not there, a row with NaN or +inf gives NaN, and
// logits are shifted by the largest before anything is multiplied. A target that is neither an id
// nor ignore_index cannot be refused here and gives NaN for its row. Arithmetic and sums are in
// float: 1 - e^logp of a confident token has an absolute error of about 1e-7.
//
// These kernels have been compiled, and their programs executed on the host; none has run on a GPU
// yet (docs/cuda.md).

namespace tether::cuda {

// What the forward pass leaves of a row, in the words of RowStatistics. The first four are all that
// its gradient needs.
struct RowState {
  float reference;     // the largest logit
  float sum;           // sum_v 2^t_v
  float weighted_sum;  // sum_v 2^t_v t_v
  float target_logit;  // -inf without a target
  // RowSums::all:
  float sum_of_squares = 0;  // sum_v 4^t_v
  float logit_sum = 0;       // over the columns above -inf
  float columns = 0;         // above -inf
};

// Where the results of the rows go, [rows] each; null: not wanted. An ignored row gets those of one
// column that is its target: logp 0, entropy 0.
struct RowResults {
  RowState* states = nullptr;
  float* logps = nullptr;
  float* entropies = nullptr;
  float* logsumexps = nullptr;  // of x / T
  bool* target_is_largest = nullptr;
  // RowSums::all:
  float* sums_of_squared_p = nullptr;
  float* mean_logits = nullptr;  // of x / T, above -inf
};

// Of a shard of the vocabulary (RowOptions) the states are those of its own columns, of none
// perhaps; those of all shards are to be merged as RowStatistics are, and the merged ones have the
// gradient of each shard. The other results mean nothing there.
//
// Throws Error, before anything is launched, for options out of range, a vocabulary of 0, a type of
// logits without kernels, results that options.sums does not ask for; and where CUDA refuses the
// launch.
void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    const RowResults& results, Stream stream);

// dlogits = dlogps * dlogp/dlogit + dentropies * dentropy/dlogit, rounded once; null = 0. dlogits
// may be the logits themselves or share nothing with them. A row that is ignored or whose upstream
// gradients are exactly 0 gets exact zeros and is not read.
void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowState* states, const float* dlogps, const float* dentropies,
                   const MutableLogits& dlogits, Stream stream);

}  // namespace tether::cuda
