#pragma once

#include <string_view>

#include "rl/kernels/policy_loss.h"

// What policy_loss asks of its arrays. Each throws Error.

namespace tether {

void check_given(std::string_view function, std::string_view name, const RowLayout& layout,
                 const ConstArray& array);
void check_arrays(const PolicyArrays& batch, const PolicyObjective& objective,
                  const PolicyGradients& gradients);
void check_offsets(std::string_view function, const RowLayout& layout);

// For a batch with a weight outside [0, 1]: says which.
[[noreturn]] void report_weight(std::string_view function, const PolicyArrays& batch);

}  // namespace tether
