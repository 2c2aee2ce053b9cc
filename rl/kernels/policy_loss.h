#pragma once

#include "../../core/parallel.h"
#include "../policy_objective.h"
#include "arrays.h"

namespace tether {

// The loss of a batch, its metrics, and its gradients where they are wanted (0 in masked slots):
// one pass over memory (levels of sequences and turns: each row is read again from the cache), no
// allocation but for the turns of a row, the same bits for every executor.
//
// Throws Error before anything is written: an array that is missing or has no memory or no type, an
// option out of range, beta > 0 without ref_logps, entropy_coef without entropies, a weight outside
// [0, 1], ids of turns that decrease, a count in `normalizer` or row_tokens that is not positive.
PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const PolicyGradients& gradients,
                         const Executor& executor = {});

// The denominators that this batch contributes; the caller adds them up over the micro-batches and
// ranks of an optimizer step and passes the sum to policy_loss.
Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor = {});

}  // namespace tether
