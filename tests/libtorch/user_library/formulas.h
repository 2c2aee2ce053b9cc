#pragma once

#include "core/number.h"
#include "rl/preference_objective.h"
#include "rl/surrogate.h"

// A user's formulas in a shared library of the user's own, compiled with hidden visibility.
namespace user {

// One type for the library and for whoever includes this header.
struct Shared {
  double strength = 0.5;
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return token.log_ratio * token.log_ratio * strength - token.advantage * token.logp;
  }
};

[[gnu::visibility("default")]] void register_shared();

// Formulas called Own, each in the unnamed namespace of its file and wrapped by on_any_device.
[[gnu::visibility("default")]] tether::Surrogate first_own();
[[gnu::visibility("default")]] tether::Surrogate second_own();

[[gnu::visibility("default")]] tether::PreferenceFormula own_pair_loss();

}  // namespace user
