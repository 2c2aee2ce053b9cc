#pragma once

#include <string_view>

#include "rl/kernels/policy_loss.h"

// What policy_loss asks beyond core/batch.h. Each throws Error.

namespace tether {

void check_arrays(const PolicyArrays& batch, const PolicyObjective& objective,
                  const PolicyGradients& gradients);

// For a batch with a weight outside [0, 1]: says which.
[[noreturn]] void report_weight(std::string_view function, const PolicyArrays& batch);

}  // namespace tether
