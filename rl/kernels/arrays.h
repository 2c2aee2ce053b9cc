#pragma once

#include "../../core/batch.h"
#include "../policy_metrics.h"
#include "../preference_metrics.h"
#include "../value_metrics.h"

// What the kernels take and give: batches in the caller's memory, gradients, totals.

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

// Pairs of answers in the caller's memory: 2 B rows, all chosen answers first, then the rejected
// ones in the same order (TRL's layout). Scores of whole answers are rows of one column. Token sums
// are in double; arrays may differ in type and stride.
struct PreferenceArrays {
  RowLayout layout;
  ConstArray logps;
  ConstArray response_mask;   // weights in [0, 1]; slots of weight 0 may hold anything
  ConstArray ref_logps = {};  // needed where the objective has a reference
};

struct PreferenceTotals {
  double loss = 0;
  PreferenceMetrics metrics;
};

// Rows of tokens for the loss of a value head, in the caller's memory. Arithmetic is in double if
// values are float64, else in float.
struct ValueArrays {
  RowLayout layout;
  ConstArray values;
  ConstArray returns;
  ConstArray response_mask;    // weights in [0, 1]; slots of weight 0 may hold anything
  ConstArray old_values = {};  // absent: values, as constants (nothing is clipped)
};

struct ValueTotals {
  double loss = 0;
  ValueMetrics metrics;
};

}  // namespace tether
