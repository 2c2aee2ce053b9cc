#pragma once

#include "../core/fields.h"
#include "aggregation.h"
#include "critic/clipped_squared.h"

namespace tether {

// loss = Agg[ 1/2 max(...) ] over tokens.
struct ValueObjective {
  ClippedSquaredError loss = {};
  Aggregation aggregation = token_mean();
};

inline void check_objective(std::string_view function, const ValueObjective& objective) {
  check_fields(function, objective.loss);
  check_range(function, "constant", objective.aggregation.constant, Range{0, largest_finite, true});
}

}  // namespace tether
