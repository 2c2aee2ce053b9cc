#pragma once

#include <cstddef>
#include <string_view>
#include <tuple>

#include "../core/catalogue.h"
#include "policy/covariance.h"
#include "policy/future_kl.h"
#include "policy/normalized_importance.h"
#include "policy/second_moment.h"
#include "policy/top_entropy.h"
#include "policy/turn_mean.h"

namespace tether {

// The only list of weights of batches in the project: one line each.
inline constexpr std::tuple kBatchWeightCatalogue{
    FormulaRow{"clip_cov", ClipCovPicks{},
               "0 at random picks of low < C < high, C = (A - mean A) (logp - mean logp), else 1",
               "arXiv:2505.22617, eq. 11", "rl/policy/covariance.h", "verl clip_cov"},
    FormulaRow{"kl_cov", KlCovPicks{}, "1 at the share of highest C, else 0; as kl_weights",
               "arXiv:2505.22617, eq. 13", "rl/policy/covariance.h", "verl kl_cov"},
    FormulaRow{"top_entropy", TopEntropy{}, "1 where H >= its quantile 1 - share, else 0",
               "arXiv:2506.01939", "rl/policy/top_entropy.h", "TRL top_entropy_quantile"},
    FormulaRow{"m2po", SecondMoment{},
               "0 at the largest x^2, x = old_logp - rollout_logp, until the mean of the others is "
               "below threshold; times the mask",
               "arXiv:2510.01161, eq. 4", "rl/policy/second_moment.h", "AReaL m2po"},
    FormulaRow{"fipo", FutureKl{}, "clip(exp F, low, high), F = u + gamma F', u = logp - old_logp",
               "arXiv:2603.19835, eq. 7", "rl/policy/future_kl.h", "ms-swift fipo"},
    FormulaRow{
        "normalized_importance", NormalizedImportance{},
        "rho / mean rho, rho = clamp(e^x, low, high), or 0 beyond; x = old_logp - rollout_logp",
        "verl, rollout_is_batch_normalize", "rl/policy/normalized_importance.h",
        "verl rollout_is_batch_normalize"},
    FormulaRow{"turn_mean", TurnMean{}, "n / (turns n_turn): turns count alike", "ROLL",
               "rl/policy/turn_mean.h", "its definition"},
};

// visit(row) for every rule.
template <class Visit>
constexpr void for_each_batch_weight(Visit visit) {
  for_each_row(kBatchWeightCatalogue, visit);
}
inline constexpr auto kBatchWeightNames = names_of_rows(kBatchWeightCatalogue);

// A rule as a choice among those names.
inline void choose(BatchWeight& rule, size_t index) {
  choose_row(rule, index, kBatchWeightCatalogue);
}
inline size_t chosen(const BatchWeight& rule) { return chosen_row(rule, kBatchWeightCatalogue); }

// That of the row called `name`, with its defaults. Throws for other names.
BatchWeight batch_weight_rule(std::string_view name);

struct BatchWeightOptions {
  BatchWeight rule = std::get<0>(kBatchWeightCatalogue).defaults;
};
template <class Visit>
void for_each_option(BatchWeightOptions& options, Visit visit) {
  options.rule.for_each_field(visit);
}
template <class Visit>
void for_each_choice(BatchWeightOptions& options, Visit visit) {
  visit("rule", options.rule, kBatchWeightNames);
  options.rule.for_each_choice(visit);
}

}  // namespace tether
