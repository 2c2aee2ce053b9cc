#pragma once

#include <concepts>
#include <cstddef>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <typeinfo>

#include "core/fields.h"
#include "core/number.h"
#include "rl/token.h"

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
    std::is_trivially_copyable_v<Formula> && sizeof(Formula) <= 64 &&
    requires(const Formula formula, const Token<Dual<double>, Constant<double>> token) {
      { formula(token) } -> std::convertible_to<Dual<double>>;
    };

// Any formula of one token's loss, as a value: an option struct with
//   template <class Number, class Constant>
//   TETHER_FORMULA Number operator()(const Token<Number, Constant>&) const
// and, if it has options, fields(). A user's own formula enters the loops as one of the library's.
class Surrogate {
 public:
  template <TokenFormula Formula>
  Surrogate(const Formula& formula) : methods_(&kMethods<Formula>) {
    std::memcpy(storage_, &formula, sizeof(Formula));
  }

  template <class T>
  void operator()(const TokenColumns<T>& in, T* value, T* dlogp) const {
    if constexpr (std::is_same_v<T, float>) {
      methods_->evaluate_float(storage_, in, value, dlogp);
    } else {
      methods_->evaluate_double(storage_, in, value, dlogp);
    }
  }

  // The formula inside, or null if it is another one.
  template <class Formula>
  const Formula* target() const {
    return *methods_->type == typeid(Formula) ? reinterpret_cast<const Formula*>(storage_)
                                              : nullptr;
  }
  const std::type_info& type() const { return *methods_->type; }

  // visit(name, value, range) for every option of the formula.
  template <class Visit>
  void for_each_field(Visit visit) {
    methods_->visit(storage_, &visit,
                    [](void* context, std::string_view name, double& value, const Range& range) {
                      (*static_cast<Visit*>(context))(name, value, range);
                    });
  }
  template <class Visit>
  void for_each_field(Visit visit) const {
    Surrogate copy = *this;
    copy.for_each_field([&](std::string_view name, const double& value, const Range& range) {
      visit(name, value, range);
    });
  }

  // How another face of the library evaluates the formula, where that face cannot know it by type.
  using FacePath = void (*)();
  void set_face_path(FacePath path) { face_path_ = path; }
  FacePath face_path() const { return face_path_; }

 private:
  using VisitField = void (*)(void*, std::string_view, double&, const Range&);
  struct Methods {
    const std::type_info* type;
    void (*evaluate_float)(const void*, const TokenColumns<float>&, float*, float*);
    void (*evaluate_double)(const void*, const TokenColumns<double>&, double*, double*);
    void (*visit)(void*, void*, VisitField);
  };

  template <class Formula, class T>
  static void evaluate_erased(const void* formula, const TokenColumns<T>& in, T* value, T* dlogp) {
    evaluate(*static_cast<const Formula*>(formula), in, value, dlogp);
  }
  template <class Formula>
  static void visit_erased(void* formula, void* context, VisitField visit) {
    tether::for_each_field(*static_cast<Formula*>(formula),
                           [&](std::string_view name, double& value, const Range& range) {
                             visit(context, name, value, range);
                           });
  }
  template <class Formula>
  static constexpr Methods kMethods{&typeid(Formula), &evaluate_erased<Formula, float>,
                                    &evaluate_erased<Formula, double>, &visit_erased<Formula>};

  alignas(double) std::byte storage_[64] = {};
  const Methods* methods_;
  FacePath face_path_ = nullptr;
};

}  // namespace tether
