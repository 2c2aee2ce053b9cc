#pragma once

#include <cstdint>

#include "../core/cuda_stream.h"
#include "pair_kl_cuda.h"
#include "rows_cuda.h"
#include "support.h"

// logits/support.h on a CUDA device, with rows, results and errors as in rows_cuda.h and
// pair_kl_cuda.h: the softmax of a row is over the ids that a sampler kept. A row without ids has
// the whole vocabulary.
//
// The ids are in the device's memory, where nobody looks at them before: each id of a row is there
// once, and its target among them, as tether.support of the Python package makes them. An id out of
// range, or a set that lacks its target, gives NaN for the row, as a bad target does.
//
// The gradient of a row is that of its kept columns and exact zeros beside them, over the logits
// too. `kept_logits` is memory for what is read meanwhile: as many places as there are ids, [rows,
// K] or, packed, [M].
//
// Throws Error, before anything is launched, for what row_statistics and logits_kl refuse, ids of
// another type than int32 and int64, or of another number of rows.
//
// Compiled, and the programs executed on the host; not run on a GPU yet (docs/cuda.md).

namespace tether::cuda {

// All that `results` asks for, whatever options.sums says.
void support_statistics(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                        const RowOptions& options, const RowResults& results, Stream stream);

// kept_logits: a float for each id.
void support_gradients(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                       const RowOptions& options, const RowState* states, const float* dlogps,
                       const float* dentropies, float* kept_logits, const MutableLogits& dlogits,
                       Stream stream);

// The values of every row, where they are wanted, and dq and dp, where they have memory, from the
// upstream gradients; a set is its ids, without a target. kept_logits: two floats for each id; null
// where no gradients are wanted.
void support_kl(const ConstLogits& q, const ConstLogits& p, const KeptIds& kept, double temperature,
                const uint8_t* active, const PairKlArrays<const float>& upstream,
                const PairKlArrays<float>& values, float* kept_logits, const MutableLogits& dq,
                const MutableLogits& dp, Stream stream);

}  // namespace tether::cuda
