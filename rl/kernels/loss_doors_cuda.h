#pragma once

#include <optional>
#include <string_view>
#include <utility>

#include "../../core/check.h"
#include "../../core/cuda_doors.h"
#include "../catalogue.h"
#include "../link_catalogue.h"
#include "../weight_catalogue.h"
#include "arrays.h"
#include "policy_checks.h"
#include "preference_loss.h"
#include "surrogate_table.h"

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

// Why a loss has no kernel, if it has none: the first rule that does not hold.
class Lacks {
 public:
  explicit Lacks(std::optional<NoKernel> first) : first_(std::move(first)) {}

  Lacks& unless(bool holds, std::string_view rule, std::string_view got = "another type") {
    if (!first_) first_ = no_kernel_unless(holds, rule, got);
    return *this;
  }
  operator std::optional<NoKernel>() const { return first_; }

 private:
  std::optional<NoKernel> first_;
};

inline std::optional<NoKernel> lacks_kernel(const PolicyArrays& batch,
                                            const PolicyObjective& objective) {
  Lacks out(lacks_types(batch, Numbers::narrow));
  out.unless(has_kernels(objective.surrogate.type()),
             "surrogate must be one of the catalogue or of a TETHER_CUDA_SURROGATE");
  for (const TokenWeight& weight : objective.weights) {
    out.unless(has_kernel(weight), "weights must be those of the catalogue");
  }
  const KlPenalty& kl = objective.kl;
  if (kl.beta == 0) return out;
  out.unless(has_kernel(kl.estimator) && has_kernel(kl.gradient),
             "kl_estimator and kl_gradient must be forms of the catalogue");
  const bool by_level_ratio = kl.correction == KlCorrection::level_ratio;
  out.unless(!shares_ratio(objective.level) || !by_level_ratio,
             "kl_correction must not be level_ratio where tokens share their ratio", "it");
  return out;
}

inline void check_loss(const char* function, const PolicyArrays& batch,
                       const PolicyObjective& objective) {
  check_objective(function, objective);
  check_device_inputs(function, batch, Numbers::narrow);
  require_kernel(function, lacks_kernel(batch, objective));
}

// Of answers, whatever the objective.
inline void check_answers(const char* function, const PreferenceArrays& batch) {
  check_device_inputs(function, batch, Numbers::narrow);
  check_rows(function, bool(batch.labels), batch.layout.rows);
}

inline std::optional<NoKernel> lacks_kernel(const PreferenceArrays& batch,
                                            const PreferenceObjective& objective) {
  return Lacks(lacks_types(batch, Numbers::narrow))
      .unless(has_kernel(objective.loss), "objective must be one of the catalogue")
      .unless(chosen(objective.link) < kLinkNames.size(), "link must be one of the catalogue");
}

inline void check_loss(const char* function, const PreferenceArrays& batch,
                       const PreferenceObjective& objective) {
  check_objective(function, objective);
  check_answers(function, batch);
  require_kernel(function, lacks_kernel(batch, objective));
}

inline std::optional<NoKernel> lacks_kernel(const ValueArrays& batch,
                                            const ValueObjective& objective) {
  return Lacks(lacks_types(batch, Numbers::narrow))
      .unless(has_kernel(objective.loss), "objective must be one of the catalogue");
}

inline void check_loss(const char* function, const ValueArrays& batch,
                       const ValueObjective& objective) {
  check_objective(function, objective);
  check_device_inputs(function, batch, Numbers::narrow);
  require_kernel(function, lacks_kernel(batch, objective));
}

}  // namespace tether::cuda
