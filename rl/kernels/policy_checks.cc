#include "rl/kernels/policy_checks.h"

#include "core/check.h"

namespace tether {

void check_weight_needs(std::string_view function, const PolicyInputs<bool>& given,
                        const std::vector<TokenWeight>& weights) {
  for (const TokenWeight& weight : weights) {
    const auto check = [&](bool needed, bool is_given, std::string_view array) {
      require(!needed || is_given, [&] {
        return named(function, array) + " must be given for the weight " +
               std::string(name_of(weight)) + ", got none";
      });
    };
    const Traits& traits = weight.formula.traits();
    check(traits.leaves, given.old_logps, "old_logps");
    check(traits.needs_ref_logps, given.ref_logps, "ref_logps");
    check(traits.needs_rollout_logps, given.rollout_logps, "rollout_logps");
  }
}

void check_needs(std::string_view function, const PolicyInputs<bool>& given,
                 const PolicyObjective& objective) {
  require(objective.kl.beta == 0 || given.ref_logps, [&] {
    return named(function, "ref_logps") + " must be given when beta is greater than 0, got beta " +
           text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0";
  });
  require(objective.entropy.coefficient == 0 || given.entropies, [&] {
    return named(function, "entropies") +
           " must be given when entropy_coef is not 0, got entropy_coef " +
           text(objective.entropy.coefficient) + " and none. Pass entropies or entropy_coef = 0";
  });
  check_weight_needs(function, given, objective.weights);
}

void check_call(std::string_view function, const PolicyArrays& batch,
                const PolicyObjective& objective, const PolicyGradients& gradients) {
  check_objective(function, objective);
  check_inputs(function, batch);
  check_needs(function, presence_of(batch), objective);
  check_array(function, "dlogps", batch.layout, gradients.logps);
  check_array(function, "dentropies", batch.layout, gradients.entropies);
  require(!gradients.entropies || bool(batch.entropies), [&] {
    return named(function, "dentropies") + " must be none without entropies, got an array";
  });
}

}  // namespace tether
