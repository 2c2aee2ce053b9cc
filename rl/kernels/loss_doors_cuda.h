#pragma once

#include "../../core/check.h"
#include "../../core/cuda_doors.h"
#include "../catalogue.h"
#include "../link_catalogue.h"
#include "../weight_catalogue.h"
#include "arrays.h"
#include "policy_checks.h"

// What the losses on CUDA have no kernels for: check_supported of each, for the .cu files and for
// what stands in their place on the host. Nothing is looked at but the host's memory.

namespace tether::cuda {

inline bool has_kernel(const TokenWeight& weight) {
  bool known = false;
  for_each_weight([&]<class Formula>(const FormulaRow<Formula>&) {
    known |= weight.formula.target<Formula>() != nullptr;
  });
  return known;
}
inline bool has_kernel(const KlForm& form) { return chosen(form) < kKlFormNames.size(); }
inline bool has_kernel(const PreferenceFormula& loss) {
  bool known = false;
  for_each_preference_formula(
      [&]<class Formula>(Formula) { known |= loss.target<Formula>() != nullptr; });
  return known;
}
inline bool has_kernel(const ValueFormula& loss) {
  bool known = false;
  for_each_value_formula(
      [&]<class Formula>(Formula) { known |= loss.target<Formula>() != nullptr; });
  return known;
}

inline void check_weights_supported(const char* function, const PolicyObjective& objective) {
  for (const TokenWeight& weight : objective.weights) {
    require_kernel(has_kernel(weight), function, "weights must be those of the catalogue",
                   "another type");
    require_kernel(rule_of(weight.level).segment != Segment::turn, function,
                   "weights must be of tokens or sequences", rule_of(weight.level).name);
  }
}

inline void check_loss(const char* function, const PolicyArrays& batch,
                       const PolicyObjective& objective, bool has_surrogate) {
  check_objective(function, objective);
  check_device_inputs(function, batch, Numbers::narrow);
  require_kernel(has_surrogate, function,
                 "surrogate must be one of the catalogue or of a TETHER_CUDA_SURROGATE",
                 "another type");
  const LevelRule& level = rule_of(objective.level);
  require_kernel(level.segment != Segment::turn, function, "level must be of tokens or sequences",
                 level.name);
  check_weights_supported(function, objective);
  if (objective.kl.beta == 0) return;
  require_kernel(has_kernel(objective.kl.estimator) && has_kernel(objective.kl.gradient), function,
                 "kl_estimator and kl_gradient must be forms of the catalogue", "another type");
  require_kernel(!level.shared || objective.kl.correction != KlCorrection::level_ratio, function,
                 "kl_correction must not be level_ratio where a sequence shares its ratio", "it");
}

// Of answers, whatever the objective.
inline void check_answers(const char* function, const PreferenceArrays& batch) {
  check_device_inputs(function, batch, Numbers::narrow);
  const bool odd = !batch.labels && batch.layout.rows % 2 != 0;
  require(!odd, [&] {
    return named(function, "logps") +
           " must have an even number of rows, chosen answers before rejected ones, got " +
           text(batch.layout.rows);
  });
}

inline void check_loss(const char* function, const PreferenceArrays& batch,
                       const PreferenceObjective& objective) {
  check_objective(function, objective);
  check_answers(function, batch);
  require_kernel(has_kernel(objective.loss), function, "objective must be one of the catalogue",
                 "another type");
  require_kernel(chosen(objective.link) < kLinkNames.size(), function,
                 "link must be one of the catalogue", "another type");
}

inline void check_loss(const char* function, const ValueArrays& batch,
                       const ValueObjective& objective) {
  check_objective(function, objective);
  check_device_inputs(function, batch, Numbers::narrow);
  require_kernel(has_kernel(objective.loss), function, "objective must be one of the catalogue",
                 "another type");
}

}  // namespace tether::cuda
