#include "bench/user_surrogate.h"

#include "rl/policy/ppo.h"

namespace tether::bench {
namespace {

// The clipped surrogate, written once more: the arithmetic is that of the library's PpoClip.
struct MySurrogate {
  double epsilon = 0.2;

  static constexpr auto fields() {
    return std::tuple{field("epsilon", &MySurrogate::epsilon, {0, 1})};
  }

  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    const Number ratio = exp(token.log_ratio);
    return -min(ratio * token.advantage, clamp(ratio, 1 - epsilon, 1 + epsilon) * token.advantage);
  }
};

}  // namespace

PolicyObjective user_objective() {
  PolicyObjective objective = presets::ppo();
  objective.surrogate = MySurrogate{};
  return objective;
}

}  // namespace tether::bench
