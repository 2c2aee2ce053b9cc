#pragma once

#include <string_view>

#include "../../core/cuda_stream.h"
#include "recursion.h"

namespace tether::cuda {

// row_scan.h on a CUDA device: every array, offset and result is in its memory. Every recursion of
// the catalogue; arithmetic in double, the same bits every run, and for a row alone, padded or
// packed. A sum over many tokens is added in another order than on the CPU. Calls return at once:
// they add a kernel to `stream`, wait for nothing, allocate nothing and can be captured in a graph.
//
// Values cannot be refused where the memory is a device's: a weight or a lambda outside [0, 1]
// gives NaN. Products of the factors of x beyond 1e300, as of V-trace without bars, count as that.
//
// Throws Error where there is no kernel: recursions of a user's, arrays of integers; and for what
// row_scan.h refuses without looking into memory.
//
// Compiled, and its program executed on the host; not run on a GPU yet (docs/cuda.md).
void scan_rows(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
               const MutableArray& advantages, const MutableArray& returns, Stream stream);

}  // namespace tether::cuda
