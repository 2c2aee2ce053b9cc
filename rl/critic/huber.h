#pragma once

#include <tuple>

#include "../../core/fields.h"
#include "../../core/formula.h"
#include "../../core/number.h"
#include "../value_objective.h"

namespace tether {

// The squared error of a value head, linear where it is large: with e = V - R,
//
//   loss = 1/2 e^2                  |e| <= delta
//          delta (|e| - delta / 2)  else
//
// d loss / d V = clip(e, -delta, delta). Huber 1964. At delta 1 torch's smooth_l1_loss, the critic
// loss of torchrl.
struct Huber {
  double delta = 1;

  static constexpr Traits traits{};
  static constexpr auto fields() {
    return std::tuple{field("delta", &Huber::delta, {0, infinity, true})};
  }

  template <class Number>
  TETHER_FORMULA Number operator()(const ValueToken<Number>& token) const {
    const Number error = token.value - token.target;
    const Number inside = clamp(error, -delta, delta);
    return inside * (error - inside * 0.5);
  }
};

namespace presets {

inline ValueObjective huber(double delta = 1) { return {.loss = Huber{delta}}; }

}  // namespace presets
}  // namespace tether
