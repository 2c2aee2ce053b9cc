#pragma once

#include <algorithm>
#include <cmath>

#include "../../core/sum.h"
#include "../policy_metrics.h"

namespace tether {

// What a part of the batch adds to the loss and to the metrics.
struct PartTotals {
  double loss;
  double segments;  // with a ratio of their own
  double sums[PolicyMetrics::kSums];
  double maxima[PolicyMetrics::kMaxima];

  // Whether no token is broken and no sum has overflowed, nor will in many such parts.
  bool is_sound() const {
    const auto moderate = [](double sum) { return std::abs(sum) < 1e304; };
    bool sound = sums[PolicyMetrics::kNonfinite] == 0 && moderate(loss);
    for (const double sum : sums) sound &= moderate(sum);
    return sound;
  }
};

// The running sums behind PolicyMetrics, over blocks and rows. Those of the terms of
// the loss belong to one row.
struct MetricSums {
  LaneSum sums[PolicyMetrics::kSums];
  LaneMax maxima[PolicyMetrics::kMaxima];
  double loss = 0, kl = 0, entropy = 0;
  double segments = 0;  // with a ratio of their own

  // The sums of the three terms since the last call.
  struct Row {
    double loss, kl, entropy;
  };
  Row take_row() {
    const Row row{sums[PolicyMetrics::kPolicyLoss].take(), sums[PolicyMetrics::kKl].take(),
                  sums[PolicyMetrics::kEntropy].take()};
    loss += row.loss;
    kl += row.kl;
    entropy += row.entropy;
    return row;
  }

  PartTotals totals(double weighted_loss) const {
    PartTotals out;
    out.loss = weighted_loss;
    out.segments = segments;
    for (int i = 0; i < PolicyMetrics::kSums; ++i) out.sums[i] = sums[i].total();
    out.sums[PolicyMetrics::kPolicyLoss] = loss;
    out.sums[PolicyMetrics::kKl] = kl;
    out.sums[PolicyMetrics::kEntropy] = entropy;
    for (int i = 0; i < PolicyMetrics::kMaxima; ++i) out.maxima[i] = maxima[i].total();
    return out;
  }
};

inline void add(const PartTotals& part, double& loss, PolicyMetrics& metrics) {
  loss += part.loss;
  for (size_t i = 0; i < PolicyMetrics::kSums; ++i) metrics.sums[2 * i] += part.sums[i];
  for (size_t i = 0; i < PolicyMetrics::kMaxima; ++i) {
    metrics.maxima[i] = std::max(metrics.maxima[i], part.maxima[i]);
  }
}

}  // namespace tether
