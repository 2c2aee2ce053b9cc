#pragma once

#include "../../core/parallel.h"
#include "../value_objective.h"
#include "arrays.h"

namespace tether {

// The loss of a batch, its metrics, and d loss / d values where `dvalues` is given (0 in masked
// slots): one pass over memory, the same bits for every executor. Denominators as in policy_loss:
// normalizer.policy and normalizer.sequences.
//
// Throws Error before anything is written, for the reasons of policy_loss.
ValueTotals value_loss(const ValueArrays& batch, const ValueObjective& objective,
                       const Normalizer& normalizer, const MutableArray& dvalues,
                       const Executor& executor = {});

}  // namespace tether
