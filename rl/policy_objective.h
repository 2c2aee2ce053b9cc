#pragma once

#include <string>
#include <string_view>

#include "estimators/kl.h"
#include "rl/aggregation.h"
#include "rl/surrogate.h"

namespace tether {

// The penalty that ties the policy to its reference: beta k3(ref_logp - logp), averaged like the
// surrogate. Its gradient is that of KL(reference || policy) (estimators/kl.h), as in GRPO.
struct KlPenalty {
  double beta = 0;  // 0: none, and no reference is needed
};

// A policy objective is a product:
//
//   loss = Agg[ S(token) ] + beta Agg[ k3(token) ]
//
// A plain value; presets (rl/grpo.h, ...) are functions that return one, to be changed at will:
//   auto objective = presets::grpo();  objective.surrogate = MySurrogate{};
struct PolicyObjective {
  Surrogate surrogate;
  KlPenalty kl = {};
  Aggregation aggregation = {};
};

// visit(name, value, range) for every number of the objective, the surrogate's first.
template <class Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.surrogate.for_each_field(visit);
  visit("beta", objective.kl.beta, Range{0, infinity});
  visit("constant", objective.aggregation.constant, Range{0, infinity, true});
}

// Throws unless every option is in its range; the message begins with `function`.
inline void check_objective(std::string_view function, const PolicyObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

// Sets the number called `name`; an unknown name lists the known ones.
inline void set_option(std::string_view function, PolicyObjective& objective, std::string_view name,
                       double value) {
  bool found = false;
  std::string known;
  for_each_option(objective, [&](std::string_view each, double& option, const Range& range) {
    known += (known.empty() ? "" : ", ") + std::string(each);
    if (each != name) return;
    check_range(function, name, value, range);
    option = value;
    found = true;
  });
  require(found, [&] {
    return std::string(function) + ": option must be one of " + known + ", got \"" +
           std::string(name) + "\"";
  });
}

}  // namespace tether
