#pragma once

#include <array>
#include <map>
#include <string>

#include "../../core/batch.h"
#include "../../core/parallel.h"
#include "../value_objective.h"

namespace tether {

// Rows of tokens for the loss of a value head, in the caller's memory. Arithmetic is in double if
// values are float64, else in float.
struct ValueArrays {
  RowLayout layout;
  ConstArray values;
  ConstArray returns;
  ConstArray response_mask;    // weights in [0, 1]; slots of weight 0 may hold anything
  ConstArray old_values = {};  // absent: values, as constants (nothing is clipped)
};

// Sums over active tokens; add those of micro-batches and ranks.
struct ValueMetrics {
  enum Sum { kTokens, kLoss, kClipped, kReturn, kReturnSquared, kError, kErrorSquared, kSums };
  std::array<double, kSums> sums{};

  void merge(const ValueMetrics& other) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other.sums[i];
  }
  // value_loss, value_clip_fraction, and explained_variance = 1 - Var(R - V) / Var R (0 where the
  // returns do not vary). 0 without tokens.
  std::map<std::string, double> to_map() const;
};

struct ValueTotals {
  double loss = 0;
  ValueMetrics metrics;
};

// The loss of a batch, its metrics, and d loss / d values where `dvalues` is given (0 in masked
// slots): one pass over memory, the same bits for every executor. Denominators as in policy_loss:
// normalizer.policy and normalizer.sequences.
//
// Throws Error before anything is written, for the reasons of policy_loss.
ValueTotals value_loss(const ValueArrays& batch, const ValueObjective& objective,
                       const Normalizer& normalizer, const MutableArray& dvalues,
                       const Executor& executor = {});

}  // namespace tether
