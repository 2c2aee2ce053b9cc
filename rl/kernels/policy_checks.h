#pragma once

#include <string_view>
#include <vector>

#include "../../core/parallel.h"
#include "../policy_objective.h"
#include "arrays.h"

// What policy losses ask beyond core/arguments.h, in words that begin with `function`. Each throws
// Error.

namespace tether {

// The arrays that the objective needs.
void check_needs(std::string_view function, const PolicyInputs<bool>& given,
                 const PolicyObjective& objective);

// Those that these weights need.
void check_weight_needs(std::string_view function, const PolicyInputs<bool>& given,
                        const std::vector<TokenWeight>& weights);

// All that is asked before a token is looked at.
void check_call(std::string_view function, const PolicyArrays& batch,
                const PolicyObjective& objective, const PolicyGradients& gradients);

// Tokens and sequences of a checked batch, of which the mask and row_tokens are looked at.
TermCounts checked_counts(std::string_view function, const PolicyArrays& batch,
                          const Executor& executor);

}  // namespace tether
