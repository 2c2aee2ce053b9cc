#pragma once

#include <cstddef>
#include <tuple>

#include "../../core/catalogue.h"
#include "gae.h"
#include "group.h"
#include "opo.h"
#include "returns.h"
#include "vtrace.h"

namespace tether {

// The only lists of estimators in the project: one line each.
inline constexpr std::tuple kRecursionCatalogue{
    FormulaRow{"gae", Gae{}, "A = r + gamma V' - V + gamma lambda A'", "arXiv:1506.02438, eq. 16",
               "estimators/advantage/gae.h", "the sum; verl gae"},
    FormulaRow{"returns", DiscountedReturns{}, "G = r + gamma G'", "Sutton and Barto 2018, eq. 3.9",
               "estimators/advantage/returns.h", "GAE with lambda 1"},
    FormulaRow{"vtrace", Vtrace{},
               "v = V + rho (r + gamma V' - V) + gamma c (v' - V'), A = rho (r + gamma v' - V)",
               "arXiv:1802.01561, eq. 1", "estimators/advantage/vtrace.h",
               "the sum; torchrl vtrace"},
};
inline constexpr std::tuple kGroupCatalogue{
    FormulaRow{"grpo", GroupAdvantage{}, "(r - mean) / (std + epsilon)",
               "arXiv:2402.03300, sec. 4.1.2", "estimators/advantage/group.h", "verl grpo"},
    FormulaRow{"dr_grpo", GroupAdvantage{.scale = AdvantageScale::none}, "r - mean",
               "arXiv:2503.20783", "estimators/advantage/group.h", "verl grpo"},
    FormulaRow{
        "rloo",
        GroupAdvantage{.baseline = AdvantageBaseline::leave_one_out, .scale = AdvantageScale::none},
        "r - mean of the others", "arXiv:2402.14740, eq. 6", "estimators/advantage/group.h",
        "verl rloo"},
    FormulaRow{"pass_at_k",
               GroupAdvantage{.baseline = AdvantageBaseline::best_of_others,
                              .scale = AdvantageScale::none},
               "max - max of the others", "arXiv:2503.19595", "estimators/advantage/group.h",
               "verl grpo_passk"},
    FormulaRow{"max_rl", GroupAdvantage{.scale = AdvantageScale::group_mean},
               "(r - mean) / (mean + epsilon)", "arXiv:2602.02710", "estimators/advantage/group.h",
               "SkyRL maxrl"},
    FormulaRow{"opo", Opo{}, "r - sum L r / sum L", "arXiv:2505.23585",
               "estimators/advantage/opo.h", "verl opo"},
};

// visit(row) for every recursion, every rule.
template <class Visit>
constexpr void for_each_recursion(Visit visit) {
  for_each_row(kRecursionCatalogue, visit);
}
template <class Visit>
constexpr void for_each_group_rule(Visit visit) {
  for_each_row(kGroupCatalogue, visit);
}

inline constexpr auto kRecursionNames = names_of_rows(kRecursionCatalogue);
inline constexpr auto kGroupRuleNames = names_of_rows(kGroupCatalogue);

// An estimator as a choice among those names: a row with its defaults, and the first with this
// formula; a user's own is none of them. The loops of the library's own are compiled with these.
void choose(Recursion& recursion, size_t index);
void choose(GroupRule& rule, size_t index);
size_t chosen(const Recursion& recursion);
size_t chosen(const GroupRule& rule);
Recursion first_recursion();
GroupRule first_group_rule();

// An estimator that is a choice itself (core/options.h), with its options and choices.
template <class Any>
struct AdvantageOptions;
template <>
struct AdvantageOptions<Recursion> {
  static constexpr const auto& kNames = kRecursionNames;
  Recursion estimator = first_recursion();
};
template <>
struct AdvantageOptions<GroupRule> {
  static constexpr const auto& kNames = kGroupRuleNames;
  GroupRule estimator = first_group_rule();
};
template <class Any, class Visit>
void for_each_option(AdvantageOptions<Any>& options, Visit visit) {
  for_each_option(options.estimator, visit);
}
template <class Any, class Visit>
void for_each_choice(AdvantageOptions<Any>& options, Visit visit) {
  visit("estimator", options.estimator, options.kNames);
  for_each_choice(options.estimator, visit);
}

}  // namespace tether
