#pragma once

#include "core/batch.h"
#include "core/parallel.h"
#include "rl/policy_metrics.h"
#include "rl/policy_objective.h"

namespace tether {

// One batch of token rows for a policy loss, in the caller's memory. Arithmetic is in double if
// logps are float64, else in float; arrays may differ in type and stride.
struct PolicyArrays {
  RowLayout layout;
  ConstArray logps;
  ConstArray advantages;      // per token, or per_row
  ConstArray response_mask;   // weights in [0, 1]; slots of weight 0 may hold anything
  ConstArray old_logps = {};  // absent: logps, as constants (the ratio is 1, its gradient is not 0)
  ConstArray ref_logps = {};  // needed when beta > 0
};

struct PolicyTotals {
  double loss = 0;
  PolicyMetrics metrics;
};

// The loss of a batch, its metrics, and d loss / d logps where `dlogps` is given (like logps in
// shape; 0 in masked slots): one pass over memory, no allocation, the same bits for every executor.
//
// Throws Error before anything is written: an array that is missing or has no memory or no type, an
// option out of range, beta > 0 without ref_logps, a weight outside [0, 1], a step count in
// `normalizer` smaller than this batch's own.
PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const MutableArray& dlogps,
                         const Executor& executor = {});

// The denominators that this batch contributes; the caller adds them up over the micro-batches and
// ranks of an optimizer step and passes the sum to policy_loss.
Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor = {});

}  // namespace tether
