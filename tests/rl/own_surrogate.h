#pragma once

#include <tuple>

#include "core/fields.h"
#include "core/macros.h"
#include "rl/token.h"

// A formula as a user of the library writes it, outside of its namespace.
struct OwnSurrogate {
  double strength = 0.3;

  static constexpr auto fields() {
    return std::tuple{tether::field("strength", &OwnSurrogate::strength, {0, 10})};
  }

  // -rho A + strength (log rho)^2
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return -token.advantage * token.ratio + strength * token.log_ratio * token.log_ratio;
  }
};
