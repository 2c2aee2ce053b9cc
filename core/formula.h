#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
#include <typeinfo>

#include "fields.h"
#include "options.h"

namespace tether {

template <class Formula>
concept SmallFormula = std::is_trivially_copyable_v<Formula> && sizeof(Formula) <= 64;

// What a formula promises, in the formula:  static constexpr Traits traits{.clips = true};
// The property tests (testing/) read it; a formula that says nothing has these.
struct Traits {
  bool stops_gradient = false;  // its slope is not the derivative of its value
  bool of_log_ratio = true;     // depends on log-probabilities by their differences alone
  bool homogeneous = true;      // in the advantage
  // Its options epsilon_low, epsilon_high and, if it has one, dual_clip bound the ratio: no
  // gradient beyond 1 - epsilon_low, 1 + epsilon_high, on the side that the advantage asks for, and
  // dual_clip.
  bool clips = false;
  bool clips_both_sides = false;  // as clips, whatever the advantage
  bool pulls_back = true;  // what ran away to the wrong side keeps a gradient that brings it back
  // Of a weight (rl/token_weight.h):
  bool needs_ref_logps = false;
  bool needs_rollout_logps = false;
  bool reads_policy = false;  // looks at logp: known in the step alone
  bool leaves = false;        // 0 or 1, of constants: tokens of weight 0 leave the mask
  bool by_sign = false;       // sees of a token, beside the statistic, the sign of A alone
  // Of an advantage (estimators/advantage/catalogue.h):
  bool needs_values = false;
  bool needs_log_ratios = false;
  bool needs_lengths = false;
};

// One choice of a formula inside an AnyFormula (core/options.h).
struct FormulaChoice {
  void* value;
  void (*set)(void*, size_t);
  size_t (*get)(const void*);
};
inline void choose(FormulaChoice& choice, size_t index) { choice.set(choice.value, index); }
inline size_t chosen(const FormulaChoice& choice) { return choice.get(choice.value); }

namespace detail {

template <class Formula>
constexpr Traits traits_of() {
  if constexpr (requires { Formula::traits; }) {
    return Formula::traits;
  } else {
    return {};
  }
}

}  // namespace detail

// An option struct with a formula, as a value of one type: the library's own or a user's. `Calls`
// is a struct of function pointers, made for each formula by Calls::of<Formula>().
template <class Calls>
class AnyFormula {
 public:
  template <SmallFormula Formula>
  explicit AnyFormula(const Formula& formula) : methods_(&kMethods<Formula>) {
    std::memcpy(storage_, &formula, sizeof(Formula));
  }

  // The formula inside, or null if it is another one.
  template <class Formula>
  const Formula* target() const {
    return *methods_->type == typeid(Formula) ? reinterpret_cast<const Formula*>(storage_)
                                              : nullptr;
  }
  const std::type_info& type() const { return *methods_->type; }
  const Traits& traits() const { return methods_->traits; }

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
    AnyFormula copy = *this;
    copy.for_each_field([&](std::string_view name, const double& value, const Range& range) {
      visit(name, value, range);
    });
  }

  // visit(name, choice, names) for every choice of the formula.
  template <class Visit>
  void for_each_choice(Visit visit) {
    methods_->visit_choices(storage_, &visit,
                            [](void* context, std::string_view name, FormulaChoice choice,
                               std::span<const std::string_view> names) {
                              (*static_cast<Visit*>(context))(name, choice, names);
                            });
  }
  template <class Visit>
  void for_each_choice(Visit visit) const {
    AnyFormula copy = *this;
    copy.for_each_choice(
        [&](std::string_view name, const FormulaChoice& choice,
            std::span<const std::string_view> names) { visit(name, choice, names); });
  }

 protected:
  const Calls& calls() const { return methods_->calls; }
  const void* formula() const { return storage_; }

 private:
  using VisitField = void (*)(void*, std::string_view, double&, const Range&);
  using VisitChoice = void (*)(void*, std::string_view, FormulaChoice,
                               std::span<const std::string_view>);
  struct Methods {
    const std::type_info* type;
    Traits traits;
    Calls calls;
    void (*visit)(void*, void*, VisitField);
    void (*visit_choices)(void*, void*, VisitChoice);
  };

  template <class Formula>
  static void visit_erased(void* formula, void* context, VisitField visit) {
    tether::for_each_field(*static_cast<Formula*>(formula),
                           [&](std::string_view name, double& value, const Range& range) {
                             visit(context, name, value, range);
                           });
  }
  template <class Formula>
  static void visit_choices_erased(void* formula, void* context, VisitChoice visit) {
    if constexpr (HasChoices<Formula>) {
      tether::for_each_choice(
          *static_cast<Formula*>(formula),
          [&]<class Value>(std::string_view name, Value& value, const auto& names) {
            visit(context, name,
                  {&value, [](void* to, size_t index) { choose(*static_cast<Value*>(to), index); },
                   [](const void* of) { return chosen(*static_cast<const Value*>(of)); }},
                  names);
          });
    }
  }
  template <class Formula>
  static constexpr Methods kMethods{&typeid(Formula), detail::traits_of<Formula>(),
                                    Calls::template of<Formula>(), &visit_erased<Formula>,
                                    &visit_choices_erased<Formula>};

  alignas(double) std::byte storage_[64] = {};
  const Methods* methods_;
};

// Throws unless its options are legal.
template <class Calls>
void check_formula(std::string_view function, const AnyFormula<Calls>& formula) {
  formula.for_each_field([&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

// Its options and choices, as those of an option struct (core/options.h).
template <class Calls, class Visit>
void for_each_option(AnyFormula<Calls>& formula, Visit visit) {
  formula.for_each_field(visit);
}
template <class Calls, class Visit>
void for_each_choice(AnyFormula<Calls>& formula, Visit visit) {
  formula.for_each_choice(visit);
}

}  // namespace tether
