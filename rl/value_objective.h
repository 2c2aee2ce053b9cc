#pragma once

#include <string_view>

#include "../core/fields.h"
#include "../core/options.h"
#include "aggregation.h"
#include "critic/clipped_squared.h"
#include "value_formula.h"

namespace tether {

// loss = Agg[ phi(V, V_old, R) ] over tokens. A plain value; presets (rl/critic/huber.h, ...) are
// functions that return one, to be changed at will.
struct ValueObjective {
  ValueFormula loss = ClippedSquaredError{};
  Aggregation aggregation = token_mean();
};

// visit(name, value, range) for every number of the objective, the formula's first.
template <SameBut<ValueObjective> Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.loss.for_each_field(visit);
  visit("constant", objective.aggregation.constant, Range{0, largest_option, true});
}

// visit(name, value, names) for every choice of the objective.
template <SameBut<ValueObjective> Objective, class Visit>
void for_each_choice(Objective& objective, Visit visit) {
  visit("aggregation", objective.aggregation.mode, kAggregationNames);
}

inline void check_objective(std::string_view function, const ValueObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

}  // namespace tether
