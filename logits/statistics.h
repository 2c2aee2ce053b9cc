#pragma once

#include <cstdint>
#include <tuple>

#include "../core/fields.h"

namespace tether {

// What a pass over a row adds up: enough for logp, for logp and entropy, for everything.
enum class RowSums { logp, entropy, all };

struct RowOptions {
  double temperature = 1;       // logits are divided by it; in [1e-6, 1e6]
  double scale = 1;             // and multiplied by this before the softcap; in [1e-6, 1e6]
  double softcap = 0;           // > 0: finite logits become softcap tanh(scale logits / softcap)
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

}  // namespace tether
