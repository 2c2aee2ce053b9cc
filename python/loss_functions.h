#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "python/functions.h"
#include "rl/catalogue.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/policy_loss.h"
#include "rl/kernels/preference_loss.h"
#include "rl/kernels/value_loss.h"

// The losses as functions of python/functions.h. The denominators of a step are options.

namespace tether::python {

// The denominators that a call states; a count that it does not name stays absent.
inline bool set_denominator(Normalizer& normalizer, std::string_view name, double value) {
  if (name == "normalizer.policy") normalizer.policy = value;
  if (name == "normalizer.kl") normalizer.kl = value;
  if (name == "normalizer.sequences") normalizer.sequences = value;
  if (name == "normalizer.world_size") normalizer.world_size = value;
  if (name == "normalizer.scale") normalizer.scale = value;
  return name.starts_with("normalizer.");
}
inline bool set_denominator(PairNormalizer& normalizer, std::string_view name, double value) {
  if (name == "normalizer.pairs") normalizer.pairs = value;
  if (name == "normalizer.tokens") normalizer.tokens = value;
  if (name == "normalizer.world_size") normalizer.world_size = value;
  if (name == "normalizer.scale") normalizer.scale = value;
  return name.starts_with("normalizer.");
}

template <class Objective, class Denominators>
struct LossOptions {
  Objective objective;
  Denominators normalizer = {};

  // The options of a call begin with a row of the catalogue.
  static LossOptions of_objective(std::string_view function, const std::string& row) {
    if constexpr (std::is_same_v<Objective, PolicyObjective>) return {preset(function, row)};
    if constexpr (std::is_same_v<Objective, PreferenceObjective>) {
      return {preference_preset(function, row)};
    }
    if constexpr (std::is_same_v<Objective, ValueObjective>) return {value_preset(function, row)};
  }
};
using PolicyOptions = LossOptions<PolicyObjective, Normalizer>;
using PreferenceOptions = LossOptions<PreferenceObjective, PairNormalizer>;
using ValueOptions = LossOptions<ValueObjective, Normalizer>;

template <class Objective, class Denominators>
void set_option(std::string_view function, LossOptions<Objective, Denominators>& options,
                std::string_view name, double value) {
  if (set_denominator(options.normalizer, name, value)) return;
  tether::set_option(function, options.objective, name, value);
}
template <class Objective, class Denominators>
void set_choice(std::string_view function, LossOptions<Objective, Denominators>& options,
                std::string_view name, std::string_view value) {
  tether::set_choice(function, options.objective, name, value);
}

template <class Objective, class Denominators, class Visit>
void for_each_option(LossOptions<Objective, Denominators>& options, Visit visit) {
  for_each_option(options.objective, visit);
}
template <class Objective, class Denominators, class Visit>
void for_each_choice(LossOptions<Objective, Denominators>& options, Visit visit) {
  for_each_choice(options.objective, visit);
}

struct PolicyLossFunction {
  template <class Array>
  using Inputs = PolicyInputs<Array>;
  using Options = PolicyOptions;
  static constexpr std::string_view kName = "policy_loss";
  static constexpr bool kGradient = true;
  static constexpr std::array kResults{Result{"loss", "scalar"},
                                       Result{"dlogps", "gradient", "logps"},
                                       Result{"dentropies", "gradient", "entropies"},
                                       Result{"sums", "block", {}, {PolicyMetrics::kSums, 2}},
                                       Result{"maxima", "block", {}, {PolicyMetrics::kMaxima}}};

  static std::vector<Tensor> run(const Call<PolicyLossFunction>& call) {
    const Tensor& logps = call.tensors.logps;
    const Tensor& entropies = call.tensors.entropies;
    const bool bonus = call.with_gradient && entropies.defined();
    PolicyGradients gradients;
    const Tensor dlogps = new_gradient(call.with_gradient, logps, gradients.logps);
    const Tensor dentropies =
        new_gradient(bonus, entropies.defined() ? entropies : logps, gradients.entropies);
    const PolicyTotals totals = policy_loss(call.arrays, call.options.objective,
                                            call.options.normalizer, gradients, torch_executor());
    return {new_scalar(totals.loss, logps), dlogps, dentropies,
            new_doubles({PolicyMetrics::kSums, 2}, totals.metrics.sums.data()),
            new_doubles({PolicyMetrics::kMaxima}, totals.metrics.maxima.data())};
  }
  static void check(std::string_view function, const Inputs<bool>& given, int64_t,
                    const Options& options) {
    check_objective(function, options.objective);
    check_needs(function, given, options.objective);
  }
};

struct LocalCountsFunction {
  template <class Array>
  using Inputs = PolicyInputs<Array>;
  using Options = PolicyOptions;
  static constexpr std::string_view kName = "local_counts";
  static constexpr bool kGradient = false;
  static constexpr std::array kResults{Result{"counts", "block", {}, {3}}};

  static std::vector<Tensor> run(const Call<LocalCountsFunction>& call) {
    const Normalizer counts = local_counts(call.arrays, call.options.objective, torch_executor());
    const double values[] = {*counts.policy, *counts.kl, *counts.sequences};
    return {new_doubles({3}, values)};
  }
  static void check(std::string_view function, const Inputs<bool>& given, int64_t,
                    const Options& options) {
    check_objective(function, options.objective);
    check_weight_needs(function, given, weights_that(true, options.objective.weights));
  }
};

struct PreferenceLossFunction {
  template <class Array>
  using Inputs = PreferenceInputs<Array>;
  using Options = PreferenceOptions;
  static constexpr std::string_view kName = "preference_loss";
  static constexpr bool kGradient = true;
  static constexpr std::array kResults{Result{"loss", "scalar"},
                                       Result{"dlogps", "gradient", "logps"},
                                       Result{"sums", "block", {}, {PreferenceMetrics::kSums, 2}}};

  static std::vector<Tensor> run(const Call<PreferenceLossFunction>& call) {
    MutableArray gradient;
    const Tensor dlogps = new_gradient(call.with_gradient, call.tensors.logps, gradient);
    const PreferenceTotals totals = preference_loss(
        call.arrays, call.options.objective, call.options.normalizer, gradient, torch_executor());
    return {new_scalar(totals.loss, call.tensors.logps), dlogps,
            new_doubles({PreferenceMetrics::kSums, 2}, totals.metrics.sums.data())};
  }
  static void check(std::string_view function, const Inputs<bool>& given, int64_t rows,
                    const Options& options) {
    check_objective(function, options.objective);
    check_needs(function, given, rows, options.objective);
  }
};

// Of a batch, what is known where logits are: log-probabilities and entropies are made of them, and
// a token knows nothing of its turn.
inline constexpr auto kOfLogits = [](const auto& argument) {
  return argument.name != "logps" && argument.name != "entropies" && argument.name != "turn_ids";
};

struct ValueLossFunction {
  template <class Array>
  using Inputs = ValueInputs<Array>;
  using Options = ValueOptions;
  static constexpr std::string_view kName = "value_loss";
  static constexpr bool kGradient = true;
  static constexpr std::array kResults{Result{"loss", "scalar"},
                                       Result{"dvalues", "gradient", "values"},
                                       Result{"sums", "block", {}, {ValueMetrics::kSums}}};

  static std::vector<Tensor> run(const Call<ValueLossFunction>& call) {
    MutableArray gradient;
    const Tensor dvalues = new_gradient(call.with_gradient, call.tensors.values, gradient);
    const ValueTotals totals = value_loss(call.arrays, call.options.objective,
                                          call.options.normalizer, gradient, torch_executor());
    return {new_scalar(totals.loss, call.tensors.values), dvalues,
            new_doubles({ValueMetrics::kSums}, totals.metrics.sums.data())};
  }
  static void check(std::string_view function, const Inputs<bool>&, int64_t,
                    const Options& options) {
    check_objective(function, options.objective);
  }
};

}  // namespace tether::python
