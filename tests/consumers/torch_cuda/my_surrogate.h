#pragma once

#include <core/macros.h>
#include <rl/token.h>

// -A logp + strength (logp - old_logp)^2
struct MySurrogate {
  double strength = 0.1;

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return -token.advantage * token.logp + strength * token.log_ratio * token.log_ratio;
  }
};
