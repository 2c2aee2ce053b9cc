#pragma once

#include <cstdint>

#include "../core/batch.h"
#include "../core/parallel.h"
#include "logits.h"
#include "pair_kl.h"
#include "statistics.h"

// Log-probabilities, entropies and divergences over a support: the ids that a sampler kept at each
// row (top-k, top-p, min-p).
//
//   logp_S  = x_y / T - log sum_{v in S} exp(x_v / T)      y in S
//   entropy = -sum_{v in S} p_v log p_v                    p = softmax over S
//   dlogp_S / dx_v = ([v = y] - p_v) / T for v in S, 0 elsewhere
//
// The engine drew y from this softmax, not from that over the vocabulary: the two log-probabilities
// differ by the log of the mass that was cut away (arXiv:2512.02556, section 3.1).
//
// A row is read at its kept ids alone, whatever is beside them, and its results are those of the
// kept logits as a row of their own (logits/rows.h, logits/pair_kl.h): K numbers instead of V. The
// order of the ids and ids that are there twice change no bit, nor does the layout; all ids
// together give the bits of the whole row.

namespace tether {

// The ids of each row, in any order: padded [rows, K], or packed, row i having the ids offsets[i]
// .. offsets[i + 1] (CSR, as vLLM returns them). -1 is none, anywhere. int32 or int64, of any
// strides. A row without ids has the whole vocabulary.
struct KeptIds {
  RowLayout layout;
  ConstArray ids;

  TETHER_INLINE int64_t id(int64_t row, int64_t i) const {
    const int64_t at = ids.index(layout, row, i);
    return ids.dtype == DType::int32 ? static_cast<const int32_t*>(ids.data)[at]
                                     : static_cast<const int64_t*>(ids.data)[at];
  }
};

// statistics[r] of every row over its support, for logp(), entropy() and the others of
// logits/statistics.h. A target that its ids lack, by rounding at the engine's edge, is one of them
// all the same: added[r] (may be null) is 1 there, else 0; the result is how many. An ignored row
// is not looked at, nor its ids. Where logits are a shard of a vocabulary (RowOptions), these are
// the statistics of its own kept columns, of none perhaps, to be merged like others; ids and
// targets are those of the whole. Throws Error before any logit is read.
int64_t support_statistics(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                           const RowOptions& options, RowStatistics* statistics,
                           uint8_t* added = nullptr, const Executor& executor = {});

// row_gradients of the kept columns, exact zeros in all others; dlogits may be the logits.
void support_gradients(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                       const RowOptions& options, const RowStatistics* statistics,
                       const double* dlogps, const double* dentropies, const MutableLogits& dlogits,
                       const Executor& executor = {});

struct SupportKlOptions {
  double temperature = 1;
  int64_t ignore_index = -100;      // rows with this target: everything 0, gradient 0, not read
  const uint8_t* active = nullptr;  // [rows], may be null: likewise those with 0
  // Of a shard, as in RowOptions: its KlStatistics are merged over the shards.
  int64_t first_id = 0;
  int64_t ids = 0;
};

// logits_kl_statistics and logits_kl_gradients of both rows over the support. Without targets
// (null) it is the ids alone.
void support_kl_statistics(const ConstLogits& q, const ConstLogits& p, const int64_t* targets,
                           const KeptIds& kept, const SupportKlOptions& options,
                           KlStatistics* statistics, const Executor& executor = {});
void support_kl_gradients(const ConstLogits& q, const ConstLogits& p, const int64_t* targets,
                          const KeptIds& kept, const SupportKlOptions& options,
                          const KlStatistics* statistics, const LogitsKl* upstream,
                          const MutableLogits& dq, const MutableLogits& dp,
                          const Executor& executor = {});

}  // namespace tether
