#pragma once

#include "../rl/surrogate.h"
#include "tensor_number.h"

namespace tether {

using TensorToken = Token<TensorNumber, TensorNumber>;

// The formula inside a surrogate on tensors, or an undefined tensor if it is not of that type.
template <class Formula>
at::Tensor evaluate_on_tensors(const Surrogate& surrogate, const TensorToken& token) {
  const Formula* formula = surrogate.target<Formula>();
  return formula ? (*formula)(token).value : at::Tensor();
}

// A user's own formula for every device: on the CPU it runs in the fused loop in any case,
// elsewhere its TensorNumber form has to be known where its type is:
//   objective.surrogate = on_any_device(MySurrogate{});
template <TokenFormula Formula>
Surrogate on_any_device(const Formula& formula) {
  Surrogate surrogate(formula);
  surrogate.set_face_path(reinterpret_cast<Surrogate::FacePath>(&evaluate_on_tensors<Formula>));
  return surrogate;
}

}  // namespace tether
