#include "libtorch/evaluators.h"
#include "tests/libtorch/user_library/formulas.h"

namespace user {
namespace {

struct Own {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return token.log_ratio * 2 - token.advantage * token.logp;
  }
};

}  // namespace

void register_shared() { tether::register_formula<Shared>(); }

tether::Surrogate first_own() { return tether::on_any_device(Own{}); }

}  // namespace user
