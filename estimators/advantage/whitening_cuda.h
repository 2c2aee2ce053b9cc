#pragma once

#include <cstdint>

#include "../../core/cuda_stream.h"
#include "whitening.h"

namespace tether::cuda {

// whitening.h on a CUDA device: every array, offset and Moments is in its memory; arithmetic in
// double, the same bits every run. Calls return at once: they add kernels to `stream`, wait for
// nothing, allocate nothing and can be captured in a graph. A weight outside [0, 1] gives NaN.
//
// Compiled, and its programs executed on the host; not run on a GPU yet (docs/cuda.md).

// Of a batch, to *out. `workspace`: so many Moments, those of its parts on the way there; `out` may
// be the first of them.
int64_t moments_workspace(const RowLayout& layout);
void moments(const WhiteningArrays& batch, Moments* workspace, Moments* out, Stream stream);

// Those of several micro-batches or ranks, in their order, as one.
void merge_moments(const Moments* parts, int64_t count, Moments* out, Stream stream);

void whiten(const WhiteningArrays& batch, const Moments* step, const Whitening& options,
            const MutableArray& out, Stream stream);

}  // namespace tether::cuda
