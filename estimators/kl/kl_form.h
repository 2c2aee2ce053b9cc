#pragma once

#include <concepts>
#include <tuple>
#include <type_traits>

#include "../../core/formula.h"
#include "../../core/number.h"
#include "forms.h"

// Any formula of d = log other - log sampled (forms.h) as a value, with its loops over columns.

namespace tether {

template <class Formula>
concept KlFormula = SmallFormula<Formula> && requires(const Formula form, const Dual<double> d) {
  { form(d) } -> std::convertible_to<Dual<double>>;
};

// K + dK / d log sampled of a constant d: the form's own, or the sum.
template <class Form, class Number>
TETHER_INLINE auto kl_score(const Form& form, const Number& d) {
  if constexpr (requires { form.score(d); }) {
    return form.score(d);
  } else {
    using T = std::remove_cvref_t<decltype(d.value)>;
    const Dual<T> k = form(Dual<T>{d.value, T(-1)});
    return Constant<T>{k.value + k.grad};
  }
}

// The log-probabilities of many tokens side by side; `size` is a multiple of 16.
template <class T>
struct KlColumns {
  const T* sampled;
  const T* other;
  int size;
};

template <class Formula, class T>
TETHER_HEADER_CLONES void fill_kl_value(const Formula& formula_in, const KlColumns<T>& in,
                                        T* value) {
  const Formula formula = formula_in;
  const T *sampled = in.sampled, *other = in.other;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    value[i] = formula(Constant<T>{other[i] - sampled[i]}).value;
  }
}

// The slope is by log sampled.
template <class Formula, class T>
TETHER_HEADER_CLONES void fill_kl_slope(const Formula& formula_in, const KlColumns<T>& in, T* value,
                                        T* slope) {
  const Formula formula = formula_in;
  const T *sampled = in.sampled, *other = in.other;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const Dual<T> k = formula(Constant<T>{other[i]} - Dual<T>{sampled[i], T(1)});
    value[i] = k.value;
    slope[i] = k.grad;
  }
}

template <class Formula, class T>
TETHER_HEADER_CLONES void fill_kl_score(const Formula& formula_in, const KlColumns<T>& in,
                                        T* score) {
  const Formula formula = formula_in;
  const T *sampled = in.sampled, *other = in.other;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    score[i] = kl_score(formula, Constant<T>{other[i] - sampled[i]}).value;
  }
}

namespace detail {

template <class Form>
constexpr KlLabels kl_labels_of() {
  if constexpr (requires { Form::labels; }) {
    return Form::labels;
  } else {
    return {};
  }
}

// Of a type with members beyond its fields() and without ==, no two are known to be the same.
template <class Form>
bool same_fields(const Form& a, const Form& b) {
  if constexpr (std::equality_comparable<Form>) {
    return a == b;
  } else if constexpr (HasFields<Form>) {
    constexpr bool kAll =
        sizeof(Form) == std::tuple_size_v<decltype(Form::fields())> * sizeof(double);
    return kAll &&
           std::apply([&](const auto&... f) { return (... && (a.*f.member == b.*f.member)); },
                      Form::fields());
  } else {
    return std::is_empty_v<Form>;
  }
}

template <class T>
struct KlLoops {
  void (*value)(const void*, const KlColumns<T>&, T*);
  void (*slope)(const void*, const KlColumns<T>&, T*, T*);
  void (*score)(const void*, const KlColumns<T>&, T*);

  // Not the loops themselves: the address of a function with clones does not resolve in a program
  // that has the kernels twice, as tether::core and in libtether.so.
  template <class Form>
  static constexpr KlLoops of() {
    return {&value_erased<Form>, &slope_erased<Form>, &score_erased<Form>};
  }
  template <class Form>
  static void value_erased(const void* form, const KlColumns<T>& in, T* value) {
    fill_kl_value(*static_cast<const Form*>(form), in, value);
  }
  template <class Form>
  static void slope_erased(const void* form, const KlColumns<T>& in, T* value, T* slope) {
    fill_kl_slope(*static_cast<const Form*>(form), in, value, slope);
  }
  template <class Form>
  static void score_erased(const void* form, const KlColumns<T>& in, T* score) {
    fill_kl_score(*static_cast<const Form*>(form), in, score);
  }
};

struct KlCalls {
  KlLoops<float> in_float;
  KlLoops<double> in_double;
  KlLabels labels;
  bool (*same)(const void*, const void*);

  template <class Form>
  static constexpr KlCalls of() {
    return {KlLoops<float>::of<Form>(), KlLoops<double>::of<Form>(), kl_labels_of<Form>(),
            &same_erased<Form>};
  }
  template <class Form>
  static bool same_erased(const void* a, const void* b) {
    return same_fields(*static_cast<const Form*>(a), *static_cast<const Form*>(b));
  }
};

}  // namespace detail

// A form of the library (catalogue.h) or a user's own: a struct with
//   template <class Number>
//   TETHER_FORMULA Number operator()(const Number& d) const
// and, where it has them, fields(), the labels of its mean, slope and score, and its score in
// closed form:
//   template <class Constant>
//   TETHER_FORMULA Constant score(const Constant& d) const
class KlForm : public AnyFormula<detail::KlCalls> {
 public:
  template <KlFormula Form>
  KlForm(const Form& form) : AnyFormula(form) {}

  const KlLabels& labels() const { return calls().labels; }

  template <class T>
  void value(const KlColumns<T>& in, T* value) const {
    loops<T>().value(formula(), in, value);
  }
  template <class T>
  void value_and_slope(const KlColumns<T>& in, T* value, T* slope) const {
    loops<T>().slope(formula(), in, value, slope);
  }
  template <class T>
  void score(const KlColumns<T>& in, T* score) const {
    loops<T>().score(formula(), in, score);
  }

  // The same formula with the same options.
  friend bool operator==(const KlForm& a, const KlForm& b) {
    return a.type() == b.type() && a.calls().same(a.formula(), b.formula());
  }

 private:
  template <class T>
  const detail::KlLoops<T>& loops() const {
    if constexpr (std::is_same_v<T, float>) {
      return calls().in_float;
    } else {
      return calls().in_double;
    }
  }
};

}  // namespace tether
