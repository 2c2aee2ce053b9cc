#pragma once

#include <string>
#include <string_view>

#include "rl/aggregation.h"
#include "rl/kl_penalty.h"
#include "rl/ratio.h"
#include "rl/surrogate.h"

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
// (rl/grpo.h, ...) are functions that return one, to be changed at will:
//   auto objective = presets::grpo();  objective.surrogate = MySurrogate{};
struct PolicyObjective {
  RatioLevel level = RatioLevel::token;
  Surrogate surrogate;
  KlPenalty kl = {};
  EntropyBonus entropy = {};
  Aggregation aggregation = {};
};

// visit(name, value, range) for every number of the objective, the surrogate's first.
template <class Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.surrogate.for_each_field(visit);
  visit("beta", objective.kl.beta, Range{0, largest_finite});
  visit("entropy_coef", objective.entropy.coefficient, Range{0, largest_finite});
  visit("constant", objective.aggregation.constant, Range{0, largest_finite, true});
}

// visit(name, value, names) for every choice of the objective, an enum whose names are `names`.
template <class Objective, class Visit>
void for_each_choice(Objective& objective, Visit visit) {
  visit("level", objective.level, kRatioLevelNames);
  visit("aggregation", objective.aggregation.mode, kAggregationNames);
  visit("kl_estimator", objective.kl.estimator, kKlEstimatorNames);
  visit("kl_gradient", objective.kl.gradient, kKlEstimatorNames);
  visit("kl_correction", objective.kl.correction, kKlCorrectionNames);
  visit("allow_biased_gradient", objective.kl.allow_biased_gradient,
        std::array<std::string_view, 2>{"false", "true"});
}

// Throws unless every option is legal; the message begins with `function`.
inline void check_objective(std::string_view function, const PolicyObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
  check_kl_penalty(function, objective.kl);
}

namespace detail {

[[noreturn]] inline void throw_unknown(std::string_view function, std::string_view what,
                                       const std::string& known, std::string_view got) {
  throw Error(std::string(function) + ": " + std::string(what) + " must be one of " + known +
              ", got \"" + std::string(got) + "\"");
}

inline void append(std::string& list, std::string_view name) {
  list += (list.empty() ? "" : ", ") + std::string(name);
}

}  // namespace detail

// Sets the number called `name`; an unknown name lists the known ones.
inline void set_option(std::string_view function, PolicyObjective& objective, std::string_view name,
                       double value) {
  bool found = false;
  std::string known;
  for_each_option(objective, [&](std::string_view each, double& option, const Range& range) {
    detail::append(known, each);
    if (each != name) return;
    check_range(function, name, value, range);
    option = value;
    found = true;
  });
  if (!found) detail::throw_unknown(function, "option", known, name);
}

// Sets the choice called `name` to the one called `value`; unknown names list the known ones.
inline void set_choice(std::string_view function, PolicyObjective& objective, std::string_view name,
                       std::string_view value) {
  bool found = false;
  std::string known;
  for_each_choice(objective,
                  [&]<class Enum>(std::string_view each, Enum& choice, const auto& names) {
                    detail::append(known, each);
                    if (each != name) return;
                    std::string values;
                    for (size_t i = 0; i < names.size() && !found; ++i) {
                      detail::append(values, names[i]);
                      if (names[i] != value) continue;
                      choice = static_cast<Enum>(i);
                      found = true;
                    }
                    if (!found) detail::throw_unknown(function, name, values, value);
                  });
  if (!found) detail::throw_unknown(function, "choice", known, name);
}

}  // namespace tether
