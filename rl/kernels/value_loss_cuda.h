#pragma once

#include <cstdint>

#include "../../core/cuda_stream.h"
#include "../value_objective.h"
#include "arrays.h"

// rl/kernels/value_loss.h on a CUDA device: every array, offset and result is in its memory.
// Arithmetic is in float, sums are in double and in one order: the same bits every run. Calls
// return at once: they add kernels to `stream`, wait for nothing, allocate nothing and can be
// captured in a graph.
//
// A weight outside [0, 1] cannot be refused where the memory is a device's, and gives NaN. The
// layout of packed rows has offsets on the device.
//
// Compiled, and the programs executed on the host; not run on a GPU yet (docs/cuda.md).

namespace tether::cuda {

// Whether there is a kernel: not for float64, nor for formulas of a user's.
bool is_supported(const ValueArrays& batch, const ValueObjective& objective);

// Throws Error where there is none, or where an option or array is wrong.
void check_supported(const char* function, const ValueArrays& batch,
                     const ValueObjective& objective);

// The bytes of `workspace`, on the device, aligned to 8.
int64_t value_workspace_bytes(const ValueArrays& batch);

// counts[2], on the device: tokens and rows with tokens. The caller adds them up over micro-batches
// and ranks.
void value_counts(const ValueArrays& batch, double* counts, void* workspace, Stream stream);

// The loss of a batch and its metrics, to totals[0] on the device, and d loss / d values where
// `dvalues` is given. `counts` are those of the whole step; null: of this batch. `factor`
// multiplies loss and gradient: Normalizer::factor().
void value_loss(const ValueArrays& batch, const ValueObjective& objective, const double* counts,
                double factor, const MutableArray& dvalues, ValueTotals* totals, void* workspace,
                Stream stream);

}  // namespace tether::cuda
