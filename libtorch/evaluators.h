#pragma once

#include <ATen/core/Tensor.h>

#include <typeindex>
#include <typeinfo>

#include "../rl/preference_objective.h"
#include "../rl/surrogate.h"
#include "tensor_number.h"

// How formulas run on tensors, by their type: a table a family, which has those of rl/catalogue.h
// from the start.

namespace tether {

using TensorToken = Token<TensorNumber, TensorNumber>;
using TensorPair = Pair<TensorNumber>;

namespace detail {

using SurrogateEvaluator = at::Tensor (*)(const Surrogate&, const TensorToken&);
using PairLossEvaluator = at::Tensor (*)(const PairLoss&, const TensorPair&);

void add_evaluator(std::type_index formula, SurrogateEvaluator evaluator);
void add_evaluator(std::type_index formula, PairLossEvaluator evaluator);

template <class Formula, class Any, class Input>
at::Tensor evaluate_on_tensors(const Any& formula, const Input& input) {
  return (*formula.template target<Formula>())(input).value;
}

// The loss of each token or pair. Throws c10::ValueError for a formula that is in no table.
at::Tensor on_tensors(const Surrogate& surrogate, const TensorToken& token);
at::Tensor on_tensors(const PairLoss& loss, const TensorPair& pair);

}  // namespace detail

// Makes a user's own formula known to every device: on the CPU it runs in the fused loop in any
// case, elsewhere its TensorNumber form has to be made where its type is. From any thread, any
// number of times; a library whose formulas are registered must stay loaded.
template <class Formula>
  requires(TokenFormula<Formula> || PairFormula<Formula>)
void register_formula() {
  if constexpr (TokenFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, Surrogate, TensorToken>);
  }
  if constexpr (PairFormula<Formula>) {
    detail::add_evaluator(typeid(Formula),
                          &detail::evaluate_on_tensors<Formula, PairLoss, TensorPair>);
  }
}

// A formula that is registered as it is used:
//   objective.surrogate = on_any_device(MySurrogate{});
template <TokenFormula Formula>
Surrogate on_any_device(const Formula& formula) {
  register_formula<Formula>();
  return formula;
}
template <PairFormula Formula>
PairLoss on_any_device(const Formula& formula) {
  register_formula<Formula>();
  return formula;
}

}  // namespace tether
