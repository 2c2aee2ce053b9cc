#pragma once

#include <string>
#include <string_view>

#include "../core/options.h"
#include "aggregation.h"
#include "kl_penalty.h"
#include "level.h"
#include "surrogate.h"

namespace tether {

// What H, the entropy of the policy at a token, earns: loss - coefficient Agg[H].
struct EntropyBonus {
  double coefficient = 0;  // 0: none, and no entropies are needed
};

// A policy objective is a product:
//
//   loss = Agg[ S(token) ] + beta Agg[ K(token) ] - entropy_coef Agg[ H(token) ]
//
// S sees the log-ratio of the level; K and H are the token's own. A plain value; presets
// (rl/policy/grpo.h, ...) are functions that return one, to be changed at will:
//   auto objective = presets::grpo();  objective.surrogate = MySurrogate{};
struct PolicyObjective {
  RatioLevel level = RatioLevel::token;
  Surrogate surrogate;
  KlPenalty kl = {};
  EntropyBonus entropy = {};
  Aggregation aggregation = {};
};

// visit(name, value, range) for every number of the objective, the surrogate's first. Those of a
// form of the penalty are called kl_estimator.NAME and kl_gradient.NAME.
template <SameBut<PolicyObjective> Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.surrogate.for_each_field(visit);
  visit("beta", objective.kl.beta, Range{0, largest_finite});
  visit("entropy_coef", objective.entropy.coefficient, Range{0, largest_finite});
  visit("constant", objective.aggregation.constant, Range{0, largest_finite, true});
  const auto visit_form = [&](const std::string& prefix, auto& form) {
    form.for_each_field([&](std::string_view name, auto& value, const Range& range) {
      visit(prefix + std::string(name), value, range);
    });
  };
  visit_form("kl_estimator.", objective.kl.estimator);
  visit_form("kl_gradient.", objective.kl.gradient);
}

// visit(name, value, names) for every choice of the objective, whose values are called `names`.
template <SameBut<PolicyObjective> Objective, class Visit>
void for_each_choice(Objective& objective, Visit visit) {
  visit("level", objective.level, kRatioLevelNames);
  visit("aggregation", objective.aggregation.mode, kAggregationNames);
  visit("kl_estimator", objective.kl.estimator, kKlFormNames);
  visit("kl_gradient", objective.kl.gradient, kKlFormNames);
  visit("kl_correction", objective.kl.correction, kKlCorrectionNames);
  visit("allow_biased_gradient", objective.kl.allow_biased_gradient, kBoolNames);
}

// Throws unless every option is legal; the message begins with `function`.
inline void check_objective(std::string_view function, const PolicyObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
  const RatioInterval weights = objective.surrogate.truncation();
  require(weights.low <= weights.high, [&] {
    return named(function, "ratio_low") + " must be at most ratio_high " + text(weights.high) +
           ", got " + text(weights.low);
  });
  check_kl_penalty(function, objective.kl);
}

}  // namespace tether
