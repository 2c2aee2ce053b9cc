#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string_view>
#include <type_traits>
#include <typeindex>
#include <typeinfo>

#include "../estimators/kl/kl_form.h"
#include "../rl/preference_objective.h"
#include "../rl/surrogate.h"
#include "../rl/token_weight.h"
#include "../rl/value_formula.h"
#include "tensor_number.h"

// How formulas run on tensors, by their type: a table a family, which has those of rl/catalogue.h
// from the start.

namespace tether {

using TensorToken = Token<TensorNumber, TensorNumber>;
using TensorExample = Example<TensorNumber>;
using TensorWeightToken = WeightToken<TensorNumber>;
using TensorValueToken = ValueToken<TensorNumber>;

namespace detail {

using SurrogateEvaluator = at::Tensor (*)(const Surrogate&, const TensorToken&);
using PreferenceEvaluator = at::Tensor (*)(const PreferenceFormula&, const TensorExample&);

// The weight of tokens with their statistic; without one, what it is made of.
struct TensorWeightInput {
  const TensorWeightToken& token;
  const TensorNumber* statistic;
};
// A form of the KL penalty at d, or its score there, of a d without a gradient.
struct TensorKlInput {
  const TensorNumber& d;
  bool score;
};
using LinkEvaluator = at::Tensor (*)(const Link&, const TensorNumber&);
using WeightEvaluator = at::Tensor (*)(const WeightFormula&, const TensorWeightInput&);
using ValueEvaluator = at::Tensor (*)(const ValueFormula&, const TensorValueToken&);
using KlEvaluator = at::Tensor (*)(const KlForm&, const TensorKlInput&);

void add_evaluator(std::type_index formula, SurrogateEvaluator evaluator);
void add_evaluator(std::type_index formula, PreferenceEvaluator evaluator);
void add_evaluator(std::type_index formula, LinkEvaluator evaluator);
void add_evaluator(std::type_index formula, WeightEvaluator evaluator);
void add_evaluator(std::type_index formula, ValueEvaluator evaluator);
void add_evaluator(std::type_index formula, KlEvaluator evaluator);

// K + dK / d log sampled of a form that does not state it (estimators/kl/kl_form.h).
at::Tensor value_plus_slope(const at::Tensor& d,
                            const std::function<TensorNumber(const TensorNumber&)>& form);

template <class Formula, class Any, class Input>
at::Tensor evaluate_on_tensors(const Any& formula, const Input& input) {
  const Formula& known = *formula.template target<Formula>();
  if constexpr (std::is_same_v<Input, TensorWeightInput>) {
    return (input.statistic ? known(input.token, *input.statistic) : known.measure(input.token))
        .value;
  } else if constexpr (std::is_same_v<Input, TensorKlInput>) {
    if (!input.score) return known(input.d).value;
    if constexpr (requires { known.score(input.d); }) {
      return known.score(input.d).value;
    } else {
      return value_plus_slope(input.d.value, [&](const TensorNumber& d) { return known(d); });
    }
  } else if constexpr (std::is_same_v<Input, TensorExample>) {
    return loss_of(known, input).value;
  } else {
    return known(input).value;
  }
}

// The loss of each token or example. Throws c10::ValueError for a formula that is in no table.
at::Tensor on_tensors(const Surrogate& surrogate, const TensorToken& token);
at::Tensor on_tensors(const PreferenceFormula& loss, const TensorExample& example);
at::Tensor on_tensors(const Link& link, const TensorNumber& score);
at::Tensor on_tensors(const WeightFormula& weight, const TensorWeightInput& input);
at::Tensor on_tensors(const ValueFormula& loss, const TensorValueToken& token);
// `option` is what has the form.
at::Tensor on_tensors(const KlForm& form, const TensorKlInput& input, std::string_view option);

}  // namespace detail

// Makes a user's own formula known to every device: on the CPU it runs in the fused loop in any
// case, elsewhere its TensorNumber form has to be made where its type is. From any thread, any
// number of times; a library whose formulas are registered must stay loaded.
template <class Formula>
  requires(TokenFormula<Formula> || ExampleFormula<Formula> || LinkFormula<Formula> ||
           TokenWeightFormula<Formula> || ValueTokenFormula<Formula> || KlFormula<Formula>)
void register_formula() {
  if constexpr (TokenFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, Surrogate, TensorToken>);
  }
  if constexpr (ExampleFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, PreferenceFormula, TensorExample>);
  }
  if constexpr (LinkFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, Link, TensorNumber>);
  }
  if constexpr (TokenWeightFormula<Formula>) {
    detail::add_evaluator(
        typeid(Formula),
        &detail::evaluate_on_tensors<Formula, WeightFormula, detail::TensorWeightInput>);
  }
  if constexpr (ValueTokenFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, ValueFormula, TensorValueToken>);
  }
  if constexpr (KlFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, KlForm, detail::TensorKlInput>);
  }
}

// A formula that is registered as it is used:
//   objective.surrogate = on_any_device(MySurrogate{});
template <class Formula>
Formula on_any_device(const Formula& formula) {
  register_formula<Formula>();
  return formula;
}

}  // namespace tether
