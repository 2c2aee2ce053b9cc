#pragma once

#include <string_view>

#include "../policy_objective.h"
#include "arrays.h"

// What policy losses ask beyond core/batch.h, in words that begin with `function`. Each throws
// Error.

namespace tether {

void check_arrays(std::string_view function, const PolicyArrays& batch,
                  const PolicyObjective& objective, const PolicyGradients& gradients);

// For a batch with a weight outside [0, 1]: says which.
[[noreturn]] void report_weight(std::string_view function, const PolicyArrays& batch);

}  // namespace tether
