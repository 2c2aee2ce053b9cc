#pragma once

#include <cstdint>

#include "../core/cuda_stream.h"
#include "logits.h"

// logits/pair_kl.h on a CUDA device: every array is in its memory, the logits are float32, bfloat16
// or float16, values and upstream gradients float32. The same definitions, and the same rules for
// columns at -inf, for NaN and for a column that has more than 5/8 of its row: its gradient is that
// of the sums over the others. Arithmetic is in float, what threads have is added in double.
//
// Calls return at once: they add a kernel to `stream`, wait for nothing, allocate nothing and can
// be captured in a graph. No row depends on another one, and sums have one order: the same bits
// every run. (Columns are read 16 bytes at a time: a row that begins at another place between two
// multiples of 16 bytes may have others.)
//
// Compiled, and the programs executed on the host; not run on a GPU yet (docs/cuda.md).

namespace tether::cuda {

// [rows] each; null: not wanted, or an upstream gradient of 0.
template <class Number>
struct PairKlArrays {
  Number* kl = nullptr;          // KL(q || p)
  Number* reverse_kl = nullptr;  // KL(p || q)
  Number* entropy = nullptr;     // H(q)
};

// The values of every row: one read of both rows. active (may be null): rows with 0 are not read
// and get zeros. Throws Error, before anything is launched, for a temperature out of range, rows
// that differ in shape or type, a type without kernels.
void logits_kl(const ConstLogits& q, const ConstLogits& p, double temperature,
               const uint8_t* active, const PairKlArrays<float>& values, Stream stream);

// dq and dp, either without memory if it is not wanted, from the upstream gradients, and the values
// where they are wanted: the rows stay on the chip, so that all of it is one read of both and one
// write of what is wanted, as long as a cluster of 8 blocks holds them (147456 columns; beyond
// that, and before sm_90, they are read again). There is nothing to be kept from a forward pass.
//
// A row that is not active, or whose upstream gradients are exactly 0 while no values are wanted,
// is not read; where they are 0 the gradients are exact zeros. dq may be q itself and dp p.
void logits_kl_gradients(const ConstLogits& q, const ConstLogits& p, double temperature,
                         const uint8_t* active, const PairKlArrays<const float>& upstream,
                         const PairKlArrays<float>& values, const MutableLogits& dq,
                         const MutableLogits& dp, Stream stream);

}  // namespace tether::cuda
