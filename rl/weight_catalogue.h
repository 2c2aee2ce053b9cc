#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>
#include <vector>

#include "../core/catalogue.h"
#include "policy/importance.h"
#include "policy/rejection.h"
#include "policy/trust_region.h"
#include "token_weight.h"

namespace tether {

// The only list of weights in the project: one line each. A weight's name is among the choices of
// an objective, where it stands for the level, and before its options
// (`truncated_importance.high`).
inline constexpr std::tuple kWeightCatalogue{
    FormulaRow{"truncated_importance", TruncatedImportance{},
               "clamp(e^x, low, high), x = old_logp - rollout_logp",
               "doi:10.1198/106186008X320456, eq. 4", "rl/policy/importance.h",
               "mpmath; verl rollout_is"},
    FormulaRow{"masked_importance", MaskedImportance{}, "e^x where low <= e^x <= high, else 0",
               "arXiv:2510.18855", "rl/policy/importance.h", "mpmath; verl rollout_is"},
    FormulaRow{"ratio_gate", RatioGate{}, "1 where low <= e^x <= high, else out of the mask",
               "verl, rollout_rs k1", "rl/policy/rejection.h", "mpmath; verl rollout_rs"},
    FormulaRow{"tv_mask", TvMask{}, "1 where e^logp - e^old_logp <= high (A > 0), >= -low (A <= 0)",
               "arXiv:2602.04879", "rl/policy/trust_region.h", "mpmath; verl dppo_tv"},
};

// visit(row) for every weight.
template <class Visit>
constexpr void for_each_weight(Visit visit) {
  for_each_row(kWeightCatalogue, visit);
}

// That of the row called `name`, with its defaults. The loops of the library's weights are compiled
// with it.
WeightFormula weight_formula(std::string_view name);

// The choice of a weight: none, or the others in the order of WeightLevel.
inline constexpr std::array<std::string_view, 6> kWeightChoiceNames{
    "none", "token", "sequence_mean", "sequence_sum", "sequence_min", "sequence_max"};

// One row of the catalogue among the weights of an objective, as a choice (core/options.h).
template <class Weights, class Formula>
struct WeightChoice {
  Weights& weights;
  const FormulaRow<Formula>& row;

  auto find() const {
    auto each = weights.begin();
    while (each != weights.end() && each->formula.type() != typeid(Formula)) ++each;
    return each;
  }
};
template <class Formula>
void choose(const WeightChoice<std::vector<TokenWeight>, Formula>& choice, size_t index) {
  const auto found = choice.find();
  if (index == 0) {
    if (found != choice.weights.end()) choice.weights.erase(found);
    return;
  }
  const auto level = static_cast<WeightLevel>(index - 1);
  if (found != choice.weights.end()) {
    found->level = level;
  } else {
    choice.weights.push_back({weight_formula(choice.row.name), level});
  }
}
template <class Weights, class Formula>
size_t chosen(const WeightChoice<Weights, Formula>& choice) {
  const auto found = choice.find();
  return found == choice.weights.end() ? 0 : static_cast<size_t>(found->level) + 1;
}

// Of one weight; a user's own is called "weight".
inline std::string_view name_of(const TokenWeight& weight) {
  std::string_view out = "weight";
  for_each_weight([&]<class Formula>(const FormulaRow<Formula>& row) {
    if (weight.formula.type() == typeid(Formula)) out = row.name;
  });
  return out;
}

}  // namespace tether
