#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "../core/options.h"
#include "aggregation.h"
#include "kl_penalty.h"
#include "level.h"
#include "surrogate.h"
#include "weight_catalogue.h"

namespace tether {

// What H, the entropy of the policy at a token, earns: loss - coefficient Agg[H].
struct EntropyBonus {
  double coefficient = 0;  // 0: none, and no entropies are needed
};

// A policy objective is a product:
//
//   loss = Agg[ W S(token) ] + beta Agg[ K(token) ] - entropy_coef Agg[ H(token) ]
//
// S sees the log-ratio of the level; K and H are the token's own. W, the product of the weights, is
// a constant. A plain value; presets
// (rl/policy/grpo.h, ...) are functions that return one, to be changed at will:
//   auto objective = presets::grpo();  objective.surrogate = MySurrogate{};
struct PolicyObjective {
  RatioLevel level = RatioLevel::token;
  LogRatioClip log_ratio_clip = {};  // of levels that share a ratio; others do not clip
  Surrogate surrogate;
  std::vector<TokenWeight> weights = {};
  KlPenalty kl = {};
  EntropyBonus entropy = {};
  Aggregation aggregation = {};
};

// The objective with one weight more, at the level that it is meant for.
inline PolicyObjective weighed(PolicyObjective objective, const WeightFormula& weight) {
  objective.weights.emplace_back(weight);
  return objective;
}

// visit(name, value, range) for every number of the objective, the surrogate's first. Those of a
// form of the penalty are called kl_estimator.NAME and kl_gradient.NAME, those of a weight by its
// name in the catalogue.
template <SameBut<PolicyObjective> Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.surrogate.for_each_field(visit);
  visit("log_ratio_low", objective.log_ratio_clip.low, Range{0, infinity});
  visit("log_ratio_high", objective.log_ratio_clip.high, Range{0, infinity});
  visit("beta", objective.kl.beta, Range{0, largest_option});
  visit("kl_ratio_high", objective.kl.ratio_high, Range{0, infinity, true});
  visit("entropy_coef", objective.entropy.coefficient, Range{0, largest_option});
  visit("constant", objective.aggregation.constant, Range{0, largest_option, true});
  const auto visit_form = [&](const std::string& prefix, auto& form) {
    form.for_each_field([&](std::string_view name, auto& value, const Range& range) {
      visit(prefix + std::string(name), value, range);
    });
  };
  visit_form("kl_estimator.", objective.kl.estimator);
  visit_form("kl_gradient.", objective.kl.gradient);
  for (auto& weight : objective.weights) {
    visit_form(std::string(name_of(weight)) + ".", weight.formula);
  }
}

// visit(name, value, names) for every choice of the objective, whose values are called `names`.
template <SameBut<PolicyObjective> Objective, class Visit>
void for_each_choice(Objective& objective, Visit visit) {
  visit("level", objective.level, kRatioLevelNames);
  visit("aggregation", objective.aggregation.mode, kAggregationNames);
  visit("kl_estimator", objective.kl.estimator, kKlFormNames);
  visit("kl_gradient", objective.kl.gradient, kKlFormNames);
  visit("kl_correction", objective.kl.correction, kKlCorrectionNames);
  visit("kl_reference", objective.kl.reference, kKlReferenceNames);
  visit("allow_biased_gradient", objective.kl.allow_biased_gradient, kBoolNames);
  for_each_weight([&](const auto& row) {
    WeightChoice choice{objective.weights, row};
    visit(row.name, choice, kWeightChoiceNames);
  });
}

// Whether log-ratios are clipped before they are added up.
inline bool clips_log_ratios(const PolicyObjective& objective) {
  return objective.log_ratio_clip.is_on() && shares_ratio(objective.level);
}

// Throws unless every option is legal; the message begins with `function`.
inline void check_objective(std::string_view function, const PolicyObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
  const auto check_interval = [&](const std::string& prefix, const RatioInterval& inside) {
    require(inside.low <= inside.high, [&] {
      return named(function, prefix + "low") + " must be at most " + prefix + "high " +
             text(inside.high) + ", got " + text(inside.low);
    });
  };
  check_interval("ratio_", objective.surrogate.truncation());
  require(objective.weights.size() <= kMaxWeights, [&] {
    return named(function, "weights") + " must be at most " + text(kMaxWeights) + ", got " +
           text(objective.weights.size());
  });
  for (const TokenWeight& weight : objective.weights) {
    check_interval(std::string(name_of(weight)) + ".", weight.formula.truncation());
  }
  check_kl_penalty(function, objective.kl);
  const bool through_ratio = objective.kl.correction == KlCorrection::level_ratio;
  require(!clips_log_ratios(objective) || objective.kl.beta == 0 || !through_ratio, [&] {
    return named(function, "kl_correction") +
           " must not be level_ratio where log-ratios are clipped, got it. Pass "
           "detached_level_ratio or another";
  });
}

// Whether what a token adds can be said of the token alone, once it is known who leaves.
inline bool is_per_token(const PolicyObjective& objective) {
  bool out = objective.level == RatioLevel::token;
  for (const TokenWeight& weight : weights_that(false, objective.weights)) {
    out &= weight.level == WeightLevel::token;
  }
  return out;
}

}  // namespace tether
