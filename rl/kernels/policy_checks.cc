#include "rl/kernels/policy_checks.h"

#include <string>

#include "core/sum.h"

namespace tether {

// Throws for the first weight outside [0, 1].
void report_weight(std::string_view function, const PolicyArrays& batch) {
  const auto where = [&](int64_t row, int64_t column) {
    if (!batch.layout.packed()) return "[" + text(row) + ", " + text(column) + "]";
    return "[" + text(batch.layout.offset(row) + column) + "]";
  };
  for (int64_t row = 0; row < batch.layout.rows; ++row) {
    for (int64_t column = 0; column < batch.layout.length(row); ++column) {
      double weight[kLanes];
      load_block<double>(batch.layout, batch.response_mask, row, column, 1, nullptr, weight);
      if (weight[0] >= 0 && weight[0] <= 1) continue;
      throw Error(std::string(function) + ": response_mask must be in [0, 1], got " +
                  text(weight[0]) + " at " + where(row, column));
    }
  }
  throw Error(std::string(function) + ": response_mask must not change during the call");
}

void check_arrays(std::string_view function, const PolicyArrays& batch,
                  const PolicyObjective& objective, const PolicyGradients& gradients) {
  const std::string name(function);
  check_given(function, "advantages", batch.layout, batch.advantages);
  check_array(function, "old_logps", batch.layout, batch.old_logps);
  check_array(function, "ref_logps", batch.layout, batch.ref_logps);
  check_array(function, "entropies", batch.layout, batch.entropies);
  check_array(function, "dlogps", batch.layout, gradients.logps);
  check_array(function, "dentropies", batch.layout, gradients.entropies);
  require(objective.kl.beta == 0 || bool(batch.ref_logps), [&] {
    return name + ": ref_logps must be given when beta is greater than 0, got beta " +
           text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0";
  });
  require(objective.entropy.coefficient == 0 || bool(batch.entropies), [&] {
    return name + ": entropies must be given when entropy_coef is not 0, got entropy_coef " +
           text(objective.entropy.coefficient) + " and none. Pass entropies or entropy_coef = 0";
  });
  require(!gradients.entropies || bool(batch.entropies),
          [&] { return name + ": dentropies must be none without entropies, got an array"; });
}

}  // namespace tether
