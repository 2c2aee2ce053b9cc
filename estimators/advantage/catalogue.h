#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <string_view>
#include <tuple>

#include "gae.h"
#include "group.h"
#include "opo.h"
#include "returns.h"
#include "vtrace.h"

namespace tether {

// One estimator of the library: its name, and the formula with its defaults.
template <class Formula>
struct AdvantageRow {
  std::string_view name;
  Formula estimator;
  std::string_view formula;
  std::string_view paper;
  std::string_view header;
  std::string_view agreement;  // who computes the same in the tests
};

// The only lists of estimators in the project: one line each.
inline constexpr std::tuple kRecursionCatalogue{
    AdvantageRow{"gae", Gae{}, "A = r + gamma V' - V + gamma lambda A'", "arXiv:1506.02438, eq. 16",
                 "estimators/advantage/gae.h", "the sum; verl gae"},
    AdvantageRow{"returns", DiscountedReturns{}, "G = r + gamma G'", "",
                 "estimators/advantage/returns.h", "GAE with lambda 1"},
    AdvantageRow{"vtrace", Vtrace{},
                 "v = V + rho (r + gamma V' - V) + gamma c (v' - V'), A = rho (r + gamma v' - V)",
                 "arXiv:1802.01561, eq. 1", "estimators/advantage/vtrace.h",
                 "the sum; torchrl vtrace"},
};
inline constexpr std::tuple kGroupCatalogue{
    AdvantageRow{"grpo", GroupAdvantage{}, "(r - mean) / (std + epsilon)",
                 "arXiv:2402.03300, sec. 4.1.2", "estimators/advantage/group.h", "verl grpo"},
    AdvantageRow{"dr_grpo", GroupAdvantage{.scale = AdvantageScale::none}, "r - mean",
                 "arXiv:2503.20783", "estimators/advantage/group.h", "verl grpo"},
    AdvantageRow{
        "rloo",
        GroupAdvantage{.baseline = AdvantageBaseline::leave_one_out, .scale = AdvantageScale::none},
        "r - mean of the others", "arXiv:2402.14740, eq. 6", "estimators/advantage/group.h",
        "verl rloo"},
    AdvantageRow{"opo", Opo{}, "r - sum L r / sum L", "arXiv:2505.23585",
                 "estimators/advantage/opo.h", "verl opo"},
};

// visit(row) for every recursion, every rule.
template <class Visit>
constexpr void for_each_recursion(Visit visit) {
  std::apply([&](const auto&... row) { (visit(row), ...); }, kRecursionCatalogue);
}
template <class Visit>
constexpr void for_each_group_rule(Visit visit) {
  std::apply([&](const auto&... row) { (visit(row), ...); }, kGroupCatalogue);
}

// Their names: kAdvantageNames<Recursion>, kAdvantageNames<GroupRule>.
template <class Any>
inline constexpr auto kAdvantageNames =
    std::apply([](const auto&... row) { return std::array{row.name...}; }, kRecursionCatalogue);
template <>
inline constexpr auto kAdvantageNames<GroupRule> =
    std::apply([](const auto&... row) { return std::array{row.name...}; }, kGroupCatalogue);

// A row with its defaults. The loops of the library's own are compiled with it.
template <class Any>
Any advantage_estimator(size_t row);
template <>
Recursion advantage_estimator<Recursion>(size_t row);
template <>
GroupRule advantage_estimator<GroupRule>(size_t row);

// The first row with this formula.
size_t chosen(const Recursion& recursion);
size_t chosen(const GroupRule& rule);
template <class Any>
  requires(std::same_as<Any, Recursion> || std::same_as<Any, GroupRule>)
void choose(Any& estimator, size_t row) {
  estimator = advantage_estimator<Any>(row);
}

// An estimator that is a choice itself (core/options.h), with its options and choices.
template <class Any>
struct AdvantageOptions {
  Any estimator = advantage_estimator<Any>(0);
};
template <class Any, class Visit>
void for_each_option(AdvantageOptions<Any>& options, Visit visit) {
  for_each_option(options.estimator, visit);
}
template <class Any, class Visit>
void for_each_choice(AdvantageOptions<Any>& options, Visit visit) {
  visit("estimator", options.estimator, kAdvantageNames<Any>);
  for_each_choice(options.estimator, visit);
}

}  // namespace tether
