#pragma once

#include <cstdint>

#include "../../core/cuda_stream.h"
#include "policy_loss.h"

// rl/kernels/policy_loss.h on a CUDA device: every array, offset and result is in its memory.
// Calls return at once: they add kernels to `stream`, wait for nothing, allocate nothing and can be
// captured in a graph. Arithmetic is in float, the terms of the loss are added in double, in one
// order: the same bits every run.
//
// Every objective of the catalogue and every product of its parts is there, but for those that
// check_supported refuses. Values cannot be refused where the memory is a device's: a weight
// outside [0, 1] gives NaN, and so does a gate that is no number; an id of a turn that is smaller
// than the one before it begins another turn.
//
// These kernels have been compiled, and their programs executed on the host; none has run on a GPU
// yet (docs/cuda.md).

namespace tether::cuda {

// Whether there is a kernel: not for float64, nor for a penalty weighed by a shared ratio with its
// gradient (kl_correction level_ratio), nor for formulas of a user's but those of a
// TETHER_CUDA_SURROGATE. The layout of packed rows has offsets on the device and, in `columns`, the
// last of them.
bool is_supported(const PolicyArrays& batch, const PolicyObjective& objective);

// Throws Error where there is none, or where an option or array is wrong.
void check_supported(const char* function, const PolicyArrays& batch,
                     const PolicyObjective& objective);

// The bytes of `workspace`, on the device, aligned to 8.
int64_t policy_workspace_bytes(const PolicyArrays& batch, const PolicyObjective& objective);

// counts[3], on the device: the tokens under the surrogate, those under the penalty and the rows
// with tokens that this batch contributes. The caller adds them up over micro-batches and ranks.
void local_counts(const PolicyArrays& batch, const PolicyObjective& objective, double* counts,
                  void* workspace, Stream stream);

// The loss of a batch and its metrics, to totals[0] on the device, and its gradients where they are
// wanted. `counts` are the denominators of the whole step; null: those of this batch. `factor`
// multiplies loss and gradients: Normalizer::factor().
void policy_loss(const PolicyArrays& batch, const PolicyObjective& objective, const double* counts,
                 double factor, const PolicyGradients& gradients, PolicyTotals* totals,
                 void* workspace, Stream stream);

}  // namespace tether::cuda
