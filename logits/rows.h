#pragma once

#include <cstdint>

#include "../core/parallel.h"
#include "logits.h"
#include "statistics.h"

// Log-probabilities and entropies of categorical distributions given by rows of logits [rows, V],
// with their gradients: one pass over the logits each.
//
//   logp    = x_y / T - log sum_v exp(x_v / T)       y: the target of the row
//   entropy = -sum_v p_v log p_v                     p = softmax(x / T), T: temperature
//
//   dlogp / dx_v    = ([v = y] - p_v) / T
//   dentropy / dx_v = -p_v (log p_v + entropy) / T
//
// where x is a logit as RowOptions scale and cap it.
//
// A logit of -inf is a column that is not there: it adds exactly 0 to both and gets a gradient of
// exactly 0; as a target it has logp = -inf. A row with NaN or +inf, or with nothing but -inf,
// gives NaN. logp <= 0 and entropy >= 0 always. Shifting a row by a constant changes nothing (where
// there is no cap). Arithmetic is in float, in double for float64; sums and the row's state are
// in double. Errors are below 4 units of the last place of the largest |x| / T in logp and 16 in
// entropy; measured for float32 and bfloat16 logits N(0, s^2), s = 1, 3, 10, V = 151936: 2e-7 and
// 5e-7. Of a confident token 1 - e^logp keeps its digits: it has the relative error of the other
// terms, about 1e-6. Gradients below the smallest normal number of the arithmetic are exactly 0,
// and terms below it, next to a largest of 1, are lost. Gradients are rounded once. A row has one
// owner and a fixed order of sums: the same bits for any executor.

namespace tether {

// The first row whose target is neither in [0, vocabulary) nor ignore_index, or `rows`.
int64_t first_bad_target(const int64_t* targets, int64_t rows, int64_t vocabulary,
                         int64_t ignore_index);

// statistics[r] of every row. Ids are checked before any logit is read. Without targets (null)
// there is no target among the columns. An ignored row gets statistics whose logp and entropy are
// 0.
void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    RowStatistics* statistics, const Executor& executor = {});

// logps[r * size + i]: of the id ids[r * size + i] in row r, given the row's statistics. Ids must
// be in [0, V).
void row_logps(const ConstLogits& logits, const RowStatistics* statistics, const int64_t* ids,
               int64_t size, const RowOptions& options, double* logps,
               const Executor& executor = {});

// dlogits = dlogps * dlogp/dlogit + dentropies * dentropy/dlogit, one read and one write, rounded
// once. dlogps, dentropies: [rows], null = 0. Columns with p = 0 get exactly 0, whatever these are;
// an infinite one makes the others infinite or NaN. A row whose upstream gradients are exactly 0
// gets exact zeros and is not read, whatever it holds. dlogits may be the logits themselves (in
// place) or share nothing with them.
void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowStatistics* statistics, const double* dlogps, const double* dentropies,
                   const MutableLogits& dlogits, const Executor& executor = {});

// The gradients of a loss with respect to the results of one row.
struct RowUpstream {
  double dlogp = 0;
  double dentropy = 0;
};

// row_statistics, then the loss, then row_gradients, for one row after another: the second pass
// finds the row in the cache. For losses whose gradient needs this row alone.
// loss(argument, row, statistics) is called for every row, on any thread.
struct RowLoss {
  RowUpstream (*function)(void* argument, int64_t row, const RowStatistics& statistics);
  void* argument = nullptr;
};
void row_losses(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                const RowLoss& loss, const MutableLogits& dlogits, const Executor& executor = {});

}  // namespace tether
