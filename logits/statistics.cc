#include "logits/statistics.h"

// The statistics of rows of logits, once they are there.

#include <algorithm>
#include <cmath>
#include <numbers>

#include "logits/logits.h"
#include "logits/stored_rows.h"

namespace tether {

using rows::is_ignored, rows::multiplier, rows::sum;

ConstLogits strided_rows(const int64_t* sizes, const int64_t* strides, int64_t dimensions) {
  ConstLogits out{
      .rows = 1, .vocabulary = sizes[dimensions - 1], .stride = strides[dimensions - 1]};
  for (int64_t d = 0; d < dimensions - 1; ++d) out.rows *= sizes[d];
  if (out.rows == 0) return out;
  int levels = 0;
  int64_t inner = 1;  // rows in the dimensions seen so far, the last one first
  for (int64_t d = dimensions - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (levels == 0) {
      out.row_stride = strides[d];
      levels = 1;
    } else if (levels == 1 && strides[d] != inner * out.row_stride) {
      out.columns = inner;
      out.batch_stride = strides[d];
      levels = 2;
    } else if (levels == 2 && strides[d] != inner / out.columns * out.batch_stride) {
      return {};
    }
    inner *= sizes[d];
  }
  return out;
}

RowStatistics merge(const RowStatistics& a, const RowStatistics& b, const RowOptions& options) {
  if (a.reference < b.reference) return merge(b, a, options);
  constexpr double kNothing = -1100;  // 2^this is 0, times anything finite
  const double distance = a.reference == b.reference ? 0 : b.reference - a.reference;
  const double shift = std::max(distance * std::numbers::log2e * multiplier(options), kNothing);
  const double power = std::exp2(shift);
  return {.reference = a.reference,
          .rest = a.rest + sum(b) * power,
          .weighted_sum = a.weighted_sum + (b.weighted_sum + sum(b) * shift) * power,
          .target_logit = std::max(a.target_logit, b.target_logit),
          .sum_of_squares = a.sum_of_squares + b.sum_of_squares * power * power,
          .logit_sum = a.logit_sum + b.logit_sum,
          .columns = a.columns + b.columns,
          .max_logit = std::max(a.max_logit, b.max_logit)};
}

// Without a cap no clamp to logp <= 0 <= entropy is needed: the reference is one of the logits,
// with t = 0, and the others exceed it by kLargestExponent at most. Without any logit both are
// inf - inf.
double logp(const RowStatistics& row, const RowOptions& options) {
  return LogpOf(row, options)(row.target_logit);
}

LogpOf::LogpOf(const RowStatistics& row, const RowOptions& options)
    : reference_(row.reference), multiplier_(multiplier(options)), log_sum_(std::log1p(row.rest)) {}

double entropy(const RowStatistics& row) {
  return std::max(std::log1p(row.rest) - std::numbers::ln2 * row.weighted_sum / sum(row), 0.0);
}

double sum_of_squared_p(const RowStatistics& row) {
  return row.sum_of_squares / (sum(row) * sum(row));
}

double mean_logit(const RowStatistics& row, const RowOptions& options) {
  return row.logit_sum / row.columns * multiplier(options);
}

bool target_is_largest(const RowStatistics& row) {
  return row.target_logit >= row.max_logit && sum(row) > 0;  // not NaN
}

int64_t first_bad_target(const int64_t* targets, int64_t rows, int64_t vocabulary,
                         int64_t ignore_index) {
  const auto legal = [=](int64_t id) { return (0 <= id && id < vocabulary) || id == ignore_index; };
  return std::find_if_not(targets, targets + rows, legal) - targets;
}

}  // namespace tether
