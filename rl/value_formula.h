#pragma once

#include <concepts>
#include <type_traits>

#include "../core/formula.h"
#include "../core/number.h"

namespace tether {

// What the loss of a value head sees of one token.
template <class Number>
struct ValueToken {
  Number value;                  // V
  ConstantOf<Number> old_value;  // at the start of the optimizer step
  ConstantOf<Number> target;     // R, the return that advantages give
};

// The same of many tokens side by side; `size` is a multiple of 16.
template <class T>
struct ValueColumns {
  const T* value;
  const T* old_value;
  const T* target;
  int size;
};

// Value and d/d V of a formula for a block of tokens.
template <class Formula, class T>
TETHER_HEADER_CLONES void evaluate(const Formula& formula_in, const ValueColumns<T>& in, T* loss,
                                   T* dloss) {
  const Formula formula = formula_in;
  const T *value = in.value, *old_value = in.old_value, *target = in.target;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const ValueToken<Dual<T>> token{{value[i], T(1)}, {old_value[i]}, {target[i]}};
    const Dual<T> each = formula(token);
    loss[i] = each.value;
    dloss[i] = each.grad;
  }
}

template <class Formula>
concept ValueTokenFormula =
    SmallFormula<Formula> && requires(const Formula formula, const ValueToken<Dual<double>> token) {
      { formula(token) } -> std::convertible_to<Dual<double>>;
    };

namespace detail {

struct ValueCalls {
  void (*in_float)(const void*, const ValueColumns<float>&, float*, float*);
  void (*in_double)(const void*, const ValueColumns<double>&, double*, double*);

  template <class Formula>
  static constexpr ValueCalls of() {
    return {&evaluate_erased<Formula, float>, &evaluate_erased<Formula, double>};
  }
  template <class Formula, class T>
  static void evaluate_erased(const void* formula, const ValueColumns<T>& in, T* loss, T* dloss) {
    evaluate(*static_cast<const Formula*>(formula), in, loss, dloss);
  }
};

}  // namespace detail

// Any formula of one token's value loss, as a value: an option struct with
//   template <class Number>
//   TETHER_FORMULA Number operator()(const ValueToken<Number>&) const
// and, if it has options, fields().
class ValueFormula : public AnyFormula<detail::ValueCalls> {
 public:
  template <ValueTokenFormula Formula>
  ValueFormula(const Formula& formula) : AnyFormula(formula) {}

  template <class T>
  void operator()(const ValueColumns<T>& in, T* loss, T* dloss) const {
    if constexpr (std::is_same_v<T, float>) {
      calls().in_float(formula(), in, loss, dloss);
    } else {
      calls().in_double(formula(), in, loss, dloss);
    }
  }
};

}  // namespace tether
