#pragma once

#include "../../core/batch.h"
#include "../../core/parallel.h"
#include "../preference_metrics.h"
#include "../preference_objective.h"

namespace tether {

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

// The loss of a batch of pairs, its metrics, and d loss / d logps where `dlogps` is given (0 in
// masked slots); the same bits for every executor. A pair without tokens on both sides is padding:
// it adds nothing and is not counted. Allocates a few numbers a row.
//
// Throws Error before anything is written: an array that is missing or has no memory or no type, an
// odd number of rows, an option out of range, no reference where one is needed, a weight outside
// [0, 1], fewer pairs in `normalizer` than in this batch.
PreferenceTotals preference_loss(const PreferenceArrays& batch,
                                 const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer, const MutableArray& dlogps,
                                 const Executor& executor = {});

// The pairs of this batch: what the caller adds up over an optimizer step.
PairNormalizer local_counts(const PreferenceArrays& batch, const Executor& executor = {});

}  // namespace tether
