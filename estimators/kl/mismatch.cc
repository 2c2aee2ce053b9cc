#include "estimators/kl/mismatch.h"

#include <algorithm>
#include <cmath>

#include "core/active_tokens.h"
#include "core/check.h"
#include "core/fields.h"
#include "estimators/kl/forms.h"

namespace tether {
namespace {

constexpr double kLargest = 300, kLargestSum = 1e140;

// The sum of ratios and of their squares, in units of the largest one: however far they are.
struct UnitSums {
  double largest = -infinity, sum = 0, squares = 0;  // its logarithm

  void add(double weight, double log_ratio) {
    if (log_ratio > largest) {
      const double unit = std::exp(largest - log_ratio);
      largest = log_ratio;
      sum *= unit;
      squares *= unit * unit;
    }
    const double r = std::exp(log_ratio - largest);
    sum += weight * r;
    squares += weight * r * r;
  }
};

// The sums of one level.
struct Ratios {
  double count = 0, sum = 0, squares = 0, min = infinity, max = 0, trace = 0;
  UnitSums units;

  void add(double weight, double log_ratio) {
    const double r = std::exp(bounded_or_nan(log_ratio, kLargest));
    count += weight;
    sum += weight * r;
    squares += weight * r * r;
    min = std::min(min, r);
    max = std::max(max, r);
    trace += 0 * r;  // the extremes know no NaN
    units.add(weight, log_ratio);
  }
  RatioSpread spread() const {
    if (count == 0) return {};
    const double ess = units.sum * (units.sum / count) / units.squares;
    return {sum / count, min + trace, max + trace, squares / count - 1, std::min(ess, 1.0) + trace};
  }
};

// The sums of one sequence.
struct Sequence {
  double tokens = 0, logp = 0, rollout_logp = 0, log_ratio = 0;
};

struct Sums {
  double k1 = 0, k3 = 0, perplexity = 0, rollout_perplexity = 0, gap = 0, gap_max = 0;
  Ratios token, sequence_mean, sequence_sum;

  void add_token(double weight, double logp, double rollout_logp, Sequence& sequence) {
    const double x = logp - rollout_logp;
    const double distance = std::abs(std::exp(logp) - std::exp(rollout_logp)) + 0 * x;
    token.add(weight, x);
    k1 -= weight * bounded_or_nan(x, kLargestSum);
    k3 += weight * tether::k3(Constant<double>{bounded_or_nan(x, kLargest)}).value;
    gap += weight * distance;
    gap_max = std::max(gap_max, distance) + 0 * distance;
    sequence.tokens += weight;
    sequence.logp += weight * logp;
    sequence.rollout_logp += weight * rollout_logp;
    sequence.log_ratio += weight * x;
  }
  void add_sequence(const Sequence& sequence) {
    const double n = sequence.tokens;
    if (n == 0) return;
    perplexity += std::exp(bounded_or_nan(-sequence.logp / n, kLargest));
    rollout_perplexity += std::exp(bounded_or_nan(-sequence.rollout_logp / n, kLargest));
    sequence_mean.add(1, sequence.log_ratio / n);
    sequence_sum.add(1, sequence.log_ratio);
  }
};

void add_row(const MismatchArrays& batch, int64_t row, Sums& sums) {
  Sequence sequence;
  const auto add = [&](double weight, double logp, double rollout_logp) {
    sums.add_token(weight, logp, rollout_logp, sequence);
  };
  for_each_active(batch.layout, row, batch.response_mask, add, batch.old_logps,
                  batch.rollout_logps);
  sums.add_sequence(sequence);
}

}  // namespace

MismatchReport mismatch_report(const MismatchArrays& batch) {
  check_inputs("mismatch_report", batch);
  check_weights("mismatch_report", batch.layout, batch.response_mask);
  Sums sums;
  for (int64_t row = 0; row < batch.layout.rows; ++row) add_row(batch, row, sums);
  const double n = sums.token.count, sequences = sums.sequence_sum.count;
  if (n == 0) return {};
  return {.tokens = n,
          .sequences = sequences,
          .k1 = sums.k1 / n,
          .k3 = sums.k3 / n,
          .perplexity = sums.perplexity / sequences,
          .rollout_perplexity = sums.rollout_perplexity / sequences,
          .probability_gap = sums.gap / n,
          .probability_gap_max = sums.gap_max,
          .token = sums.token.spread(),
          .sequence_mean = sums.sequence_mean.spread(),
          .sequence_sum = sums.sequence_sum.spread()};
}

}  // namespace tether
