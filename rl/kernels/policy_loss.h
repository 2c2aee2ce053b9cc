#pragma once

#include "../../core/batch.h"
#include "../../core/parallel.h"
#include "../policy_metrics.h"
#include "../policy_objective.h"

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
  ConstArray entropies = {};  // of the policy at each token; needed when entropy_coef is not 0
};

// Where the gradients go, each like logps in shape; absent: not wanted.
struct PolicyGradients {
  MutableArray logps = {};
  MutableArray entropies = {};
};

struct PolicyTotals {
  double loss = 0;
  PolicyMetrics metrics;
};

// The loss of a batch, its metrics, and its gradients where they are wanted (0 in masked slots):
// one pass over memory (levels of whole sequences: each row is read again from the cache), no
// allocation, the same bits for every executor.
//
// Throws Error before anything is written: an array that is missing or has no memory or no type, an
// option out of range, beta > 0 without ref_logps, entropy_coef without entropies, a weight outside
// [0, 1], a step count in `normalizer` smaller than this batch's own.
PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const PolicyGradients& gradients,
                         const Executor& executor = {});

// The denominators that this batch contributes; the caller adds them up over the micro-batches and
// ranks of an optimizer step and passes the sum to policy_loss.
Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor = {});

}  // namespace tether
