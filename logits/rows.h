#pragma once

#include <cstdint>
#include <limits>
#include <tuple>

#include "../core/batch.h"
#include "../core/fields.h"
#include "../core/parallel.h"

// Log-probabilities and entropies of categorical distributions given by rows of logits [rows, V],
// with their gradients: one pass over the logits each.
//
//   x       = scale logit, or softcap tanh(scale logit / softcap) where softcap > 0
//   logp    = x_y / T - log sum_v exp(x_v / T)       y: the target of the row
//   entropy = -sum_v p_v log p_v                     p = softmax(x / T), T: temperature
//
//   dlogp / dx_v    = ([v = y] - p_v) / T
//   dentropy / dx_v = -p_v (log p_v + entropy) / T
//
// A logit of -inf is a column that is not there: it adds exactly 0 to both and gets a gradient of
// exactly 0; as a target it has logp = -inf. A row with NaN or +inf, or with nothing but -inf,
// gives NaN. logp <= 0 and entropy >= 0 always. Shifting a row by a constant changes nothing (where
// there is no softcap). Arithmetic is in float, in double for float64; sums and the row's state are
// in double. Errors are below 4 units of the last place of the largest |x| / T in logp and 16 in
// entropy; measured for float32 and bfloat16 logits N(0, s^2), s = 1, 3, 10, V = 151936: 2e-7 and
// 5e-7. Of a confident token 1 - e^logp keeps its digits: it has the relative error of the other
// terms, about 1e-6. Gradients below the smallest normal number of the arithmetic are exactly 0,
// and terms below it, next to a largest of 1, are lost. Gradients are rounded once. A row has one
// owner and a fixed order of sums: the same bits for any executor.

namespace tether {

// Logits [rows, vocabulary] in somebody else's memory. Row r starts at element
// (r / columns) * batch_stride + (r % columns) * row_stride, which covers slices of [B, T, V];
// strides count elements and may be anything.
template <class Byte>
struct BasicLogits {
  Byte* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0;
  int64_t vocabulary = 0;
  int64_t row_stride = 0;
  int64_t stride = 1;  // from one logit of a row to the next
  int64_t columns = std::numeric_limits<int64_t>::max();
  int64_t batch_stride = 0;

  int64_t offset(int64_t row) const {
    return row / columns * batch_stride + row % columns * row_stride;
  }
};

using ConstLogits = BasicLogits<const void>;
using MutableLogits = BasicLogits<void>;

// The layout of logits [..., V], given sizes and strides of `dimensions` >= 1: leading dimensions
// that lie end to end are one. A vocabulary of 0 says that more than two are left, which rows
// cannot express. Memory and type are the caller's to fill in.
ConstLogits strided_rows(const int64_t* sizes, const int64_t* strides, int64_t dimensions);

// What a pass over a row adds up: enough for logp, for logp and entropy, for everything.
enum class RowSums { logp, entropy, all };

struct RowOptions {
  double temperature = 1;
  double scale = 1;             // of the logits, before the softcap
  double softcap = 0;           // 0: none
  int64_t ignore_index = -100;  // rows with this target: logp 0, entropy 0, gradient 0, not read
  RowSums sums = RowSums::entropy;
  // A shard of the vocabulary holds the columns of the ids [first_id, first_id + V) of `ids`
  // altogether; targets are ids of the whole. 0: not a shard.
  int64_t first_id = 0;
  int64_t ids = 0;

  static constexpr auto fields() {
    constexpr Range kPositive{1e-6, 1e6};
    return std::tuple{field("temperature", &RowOptions::temperature, kPositive),
                      field("scale", &RowOptions::scale, kPositive),
                      field("softcap", &RowOptions::softcap, Range{0, 1e6})};
  }
};

// What one pass over a row, or over any part of its columns, leaves behind, all that logp, entropy
// and the gradients need of it. "Logits" below are x / scale where there is no softcap, else x.
//   t_v = (logit_v - reference) log2(e) multiplier,  rest = sum_v 2^t_v - 1
// The reference is a logit of the row, the largest one where a term outweighs all others together;
// its 1 is never added, so that the rest keeps its digits.
// The default is the statistics of no columns. What `sums` did not ask for is NaN.
struct RowStatistics {
  double reference = -infinity;
  double rest = -1;
  double weighted_sum = 0;          // sum_v 2^t_v t_v
  double target_logit = -infinity;  // -inf where the target is not among the columns
  double sum_of_squares = 0;        // sum_v 4^t_v
  double logit_sum = 0;             // over the columns above -inf
  double columns = 0;               // above -inf
  double max_logit = -infinity;
};

// What an ignored row has: one column, which is the target. logp 0 and entropy 0 at any
// temperature.
constexpr RowStatistics ignored_row() {
  return {.reference = 0,
          .rest = 0,
          .weighted_sum = 0,
          .target_logit = 0,
          .sum_of_squares = 1,
          .logit_sum = 0,
          .columns = 1,
          .max_logit = 0};
}

// The statistics of the columns of both: shards of a vocabulary, in any order.
RowStatistics merge(const RowStatistics& a, const RowStatistics& b, const RowOptions& options);

double logp(const RowStatistics& row, const RowOptions& options);

// That of any logit of the row, in the words of RowStatistics: one logarithm for all of them.
class LogpOf {
 public:
  LogpOf(const RowStatistics& row, const RowOptions& options);
  double operator()(double logit) const {
    const double logp = (logit - reference_) * multiplier_ - log_sum_;
    return logp > 0 ? 0 : logp;
  }

 private:
  double reference_, multiplier_, log_sum_;
};

double entropy(const RowStatistics& row);

// RowSums::all:
double sum_of_squared_p(const RowStatistics& row);                       // sum_v p_v^2
double mean_logit(const RowStatistics& row, const RowOptions& options);  // of x / T, above -inf
bool target_is_largest(const RowStatistics& row);                        // no other has a larger p

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
// once. dlogps, dentropies: [rows], null = 0. A row whose upstream gradients are exactly 0 gets
// exact zeros and is not read, whatever it holds. dlogits may be the logits themselves (in place)
// or share nothing with them.
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
