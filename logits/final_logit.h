#pragma once

#include "../core/macros.h"
#include "../core/math.h"

namespace tether::rows {

// The final logit x of a stored one: itself, or softcap tanh(logit scale / softcap) where capped. A
// logit of -inf stays there.
template <class Real, bool kCapped>
struct FinalLogit {
  Real inner = 1;  // scale / softcap
  Real cap = 1;    // softcap

  TETHER_INLINE Real operator()(Real logit) const {
    if constexpr (!kCapped) return logit;
    return logit > -math::detail::Format<Real>::kInfinity ? cap * tanh(logit) : logit;
  }
  // dx / dlogit over scale: 1 - tanh^2 = 4 q / (1 + q)^2, q = e^(-2 |z|), which keeps its digits.
  TETHER_INLINE Real slope(Real logit) const {
    if constexpr (!kCapped) return Real(1);
    const Real z = inner * logit;
    const Real q = math::exp(Real(-2) * (z < Real(0) ? -z : z));
    const Real sum = Real(1) + q;
    return Real(4) * q / (sum * sum);
  }

 private:
  TETHER_INLINE Real tanh(Real logit) const {
    const Real e = math::expm1(Real(2) * inner * logit, Real(40));
    return e / (e + Real(2));
  }
};

}  // namespace tether::rows
