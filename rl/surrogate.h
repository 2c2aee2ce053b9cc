#pragma once

#include <concepts>
#include <type_traits>

#include "../core/formula.h"
#include "../core/number.h"
#include "token.h"

namespace tether {

// The same quantity of many tokens side by side; `size` is a multiple of 16.
template <class T>
struct TokenColumns {
  const T* logp;
  const T* log_ratio;
  const T* ratio;  // exp(log_ratio), saturated
  const T* advantage;
  const T* old_logp;
  const T* ref_logp;
  int size;
};

// Value and d/d logp of a formula for a block of tokens.
template <class Formula, class T>
TETHER_HEADER_CLONES void evaluate(const Formula& formula_in, const TokenColumns<T>& in, T* value,
                                   T* dlogp) {
  const Formula formula = formula_in;
  const T *logp = in.logp, *log_ratio = in.log_ratio, *ratio = in.ratio, *advantage = in.advantage,
          *old_logp = in.old_logp, *ref_logp = in.ref_logp;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const Token<Dual<T>, Constant<T>> token{{logp[i], T(1)},      {log_ratio[i], T(1)},
                                            {ratio[i], ratio[i]}, {advantage[i]},
                                            {old_logp[i]},        {ref_logp[i]}};
    const Dual<T> loss = formula(token);
    value[i] = loss.value;
    dlogp[i] = loss.grad;
  }
}

template <class Formula>
concept TokenFormula =
    SmallFormula<Formula> &&
    requires(const Formula formula, const Token<Dual<double>, Constant<double>> token) {
      { formula(token) } -> std::convertible_to<Dual<double>>;
    };

// The ratios whose weight a formula takes as it is. Beyond, a token counts as clipped although it
// keeps a gradient; a formula that truncates weights states it as
//   RatioInterval truncation() const
// For the others, whose clipped tokens have no gradient, it is every ratio.
struct RatioInterval {
  double low = 0;
  double high = infinity;
};

namespace detail {

template <class Formula>
RatioInterval truncation_of(const void* formula) {
  if constexpr (requires(const Formula& each) { each.truncation(); }) {
    return static_cast<const Formula*>(formula)->truncation();
  }
  return {};
}

struct TokenCalls {
  void (*in_float)(const void*, const TokenColumns<float>&, float*, float*);
  void (*in_double)(const void*, const TokenColumns<double>&, double*, double*);
  RatioInterval (*truncation)(const void*);

  template <class Formula>
  static constexpr TokenCalls of() {
    return {&evaluate_erased<Formula, float>, &evaluate_erased<Formula, double>,
            &truncation_of<Formula>};
  }
  template <class Formula, class T>
  static void evaluate_erased(const void* formula, const TokenColumns<T>& in, T* value, T* dlogp) {
    evaluate(*static_cast<const Formula*>(formula), in, value, dlogp);
  }
};

}  // namespace detail

// Any formula of one token's loss, as a value: an option struct with
//   template <class Number, class Constant>
//   TETHER_FORMULA Number operator()(const Token<Number, Constant>&) const
// and, if it has options, fields(). A user's own formula enters the loops as one of the library's.
class Surrogate : public AnyFormula<detail::TokenCalls> {
 public:
  template <TokenFormula Formula>
  Surrogate(const Formula& formula) : AnyFormula(formula) {}

  RatioInterval truncation() const { return calls().truncation(formula()); }

  template <class T>
  void operator()(const TokenColumns<T>& in, T* value, T* dlogp) const {
    if constexpr (std::is_same_v<T, float>) {
      calls().in_float(formula(), in, value, dlogp);
    } else {
      calls().in_double(formula(), in, value, dlogp);
    }
  }
};

}  // namespace tether
