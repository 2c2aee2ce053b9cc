#pragma once

#include <cstdint>

#include "../../core/cuda_stream.h"
#include "../preference_objective.h"
#include "arrays.h"

// rl/kernels/preference_loss.h on a CUDA device: every array, offset and result is in its memory.
// Log-probabilities are float32, bfloat16 or float16, sums and the loss of the examples in double
// and in one order: the same bits every run. Calls return at once: they add kernels to `stream`,
// wait for nothing, allocate nothing and can be captured in a graph.
//
// Throws Error for what check_supported and preference_loss.h refuse without looking into memory.
// Values cannot be refused where the memory is a device's: weights and labels that are none, and
// scores above 0 where a link takes log-probabilities, give NaN. The layout of packed rows has
// offsets on the device.
//
// Compiled, and the programs executed on the host; not run on a GPU yet (docs/cuda.md).

namespace tether::cuda {

// Whether there is a kernel: not for float64, nor for losses and links of a user's.
bool is_supported(const PreferenceArrays& batch, const PreferenceObjective& objective);

// Throws Error where there is none, or where an option or array is wrong.
void check_supported(const char* function, const PreferenceArrays& batch,
                     const PreferenceObjective& objective);

// The bytes of `workspace`, on the device, aligned to 8.
int64_t preference_workspace_bytes(const PreferenceArrays& batch);

// counts[2], on the device: the pairs, or answers with labels, and the tokens of the NLL. The
// caller adds them up over micro-batches and ranks.
void preference_counts(const PreferenceArrays& batch, double* counts, void* workspace,
                       Stream stream);

// The loss of a batch and its metrics, to totals[0] on the device, and d loss / d logps where
// `dlogps` is given. `counts` are those of the whole step; null: of this batch. `factor` multiplies
// loss and gradient: PairNormalizer::factor().
void preference_loss(const PreferenceArrays& batch, const PreferenceObjective& objective,
                     const double* counts, double factor, const MutableArray& dlogps,
                     PreferenceTotals* totals, void* workspace, Stream stream);

}  // namespace tether::cuda
