#pragma once

#include <cstdint>

#include "../core/fields.h"
#include "../core/parallel.h"
#include "logits.h"

// Exact KL divergences between the categorical distributions of two rows of logits: one pass over
// both rows gives both directions and the entropy, one more their gradients.
//
//   KL(q || p) = sum_v q_v (log q_v - log p_v)     q = softmax(x / T), p = softmax(y / T)
//   H(q)       = -sum_v q_v log q_v
//
//   dKL(q || p) / dx_v = q_v (log q_v - log p_v - KL(q || p)) / T,   dKL(q || p) / dy_v = (p_v -
//   q_v) / T
//
// A column at -inf in both rows is not there. A column at -inf in p alone makes KL(q || p)
// infinite, and its gradients by x NaN, if q_v is above 2^-100, and else adds nothing; likewise
// KL(p || q). In gradients probabilities below 2^-102 (float64: 2^-998) count as 0: such a column
// has no gradient by its own row of an infinite divergence either; one that is 0 in both has
// gradients of 0, whatever the upstream ones are. Finite logits give no NaN. NaN or +inf, or
// nothing but -inf, make everything NaN. Results are never negative. Gradients below the smallest
// normal number are exactly 0. Arithmetic and sums as in logits/rows.h. Errors are those of logp,
// absolute: about 1e-6 of the largest |x|. A divergence below 1e-3 (float64: 2e-12) is found in one
// pass more, within about 1e-5 of itself and 1e-14 (1e-31); of rows that are a constant c apart,
// for |c| > 1, times |c| and c^2.

namespace tether {

// Both rows' sums, as a pass leaves them. The references are the highest logits: 1 / sum is the
// highest probability.
struct KlStatistics {
  double reference_q = -infinity, sum_q = 0;
  double reference_p = -infinity, sum_p = 0;
  // Over the columns above -inf in both; t of q, u of p, as in RowStatistics:
  double forward = 0;       // sum_v 2^t_v (t_v - u_v)
  double reverse = 0;       // sum_v 2^u_v (u_v - t_v)
  double weighted_sum = 0;  // sum_v 2^t_v t_v
  double alone_q = 0;       // the largest 2^t_v where p is -inf
  double alone_p = 0;       // the largest 2^u_v where q is -inf
};

// Values of a row, or the gradients of a loss with respect to them.
struct LogitsKl {
  double kl = 0;          // KL(q || p)
  double reverse_kl = 0;  // KL(p || q)
  double entropy = 0;     // H(q)
};

LogitsKl logits_kl(const KlStatistics& row);

// The columns of both, as of shards of a vocabulary.
KlStatistics merge(const KlStatistics& a, const KlStatistics& b, double temperature);

// statistics[r] of every row. q and p: the same type and shape, any strides. active (may be null):
// rows with 0 are not read and get zeros. Throws Error before anything is read.
void logits_kl_statistics(const ConstLogits& q, const ConstLogits& p, double temperature,
                          const uint8_t* active, KlStatistics* statistics,
                          const Executor& executor = {});

// dq and dp, either without memory if it is not wanted, from upstream[r]. The columns are those of
// the statistics, all of them. A row whose upstream is
// exactly 0 gets exact zeros and is not read. dq may be q itself and dp p (in place).
void logits_kl_gradients(const ConstLogits& q, const ConstLogits& p, double temperature,
                         const KlStatistics* statistics, const LogitsKl* upstream,
                         const MutableLogits& dq, const MutableLogits& dp,
                         const Executor& executor = {});

}  // namespace tether
