#pragma once

#include <string_view>

#include "../../core/parallel.h"
#include "../policy_objective.h"
#include "arrays.h"

// What policy losses ask beyond core/batch.h, in words that begin with `function`. Each throws
// Error.

namespace tether {

void check_arrays(std::string_view function, const PolicyArrays& batch,
                  const PolicyObjective& objective, const PolicyGradients& gradients);

// Tokens and sequences of the batch, of which logps and response_mask are looked at.
TermCounts checked_counts(std::string_view function, const PolicyArrays& batch,
                          const PolicyObjective& objective, const Executor& executor);

// For a batch with a weight outside [0, 1]: says which.
[[noreturn]] void report_weight(std::string_view function, const PolicyArrays& batch);

}  // namespace tether
