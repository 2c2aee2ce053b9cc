#include "libtorch/evaluators.h"
#include "tests/libtorch/user_library/formulas.h"

namespace user {
namespace {

struct Own {
  double strength = 3;
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return token.log_ratio * token.log_ratio * strength;
  }
};

struct OwnPair {
  template <class Number>
  TETHER_FORMULA Number operator()(const tether::Pair<Number>& pair) const {
    return exp(-pair.margin());
  }
};

}  // namespace

tether::Surrogate second_own() { return tether::on_any_device(Own{}); }

tether::PreferenceFormula own_pair_loss() { return tether::on_any_device(OwnPair{}); }

}  // namespace user
