#pragma once

#include <concepts>

#include "../core/formula.h"
#include "../core/number.h"

namespace tether {

template <class Formula>
concept LinkFormula =
    SmallFormula<Formula> && requires(const Formula formula, const Dual<double, 2> score) {
      { formula(score) } -> std::convertible_to<Dual<double, 2>>;
    };

namespace detail {

struct LinkCalls {
  Dual<double, 2> (*evaluate)(const void*, const Dual<double, 2>&);

  template <class Formula>
  static constexpr LinkCalls of() {
    const auto evaluate = [](const void* formula, const Dual<double, 2>& score) {
      return Dual<double, 2>{(*static_cast<const Formula*>(formula))(score)};
    };
    return LinkCalls{evaluate};  // nvcc takes bare braces around one member for the member
  }
};

}  // namespace detail

// g(S): what the score of an answer becomes before it is compared, as a value. One of the library
// (link_catalogue.h) or your own: an option struct with
//   template <class Number>
//   TETHER_FORMULA Number operator()(const Number& score) const
// and, if it has options, fields(). Constants cancel in the margin.
class Link : public AnyFormula<detail::LinkCalls> {
 public:
  template <LinkFormula Formula>
  Link(const Formula& formula) : AnyFormula(formula) {}

  Dual<double, 2> operator()(const Dual<double, 2>& score) const {
    return calls().evaluate(formula(), score);
  }
};

}  // namespace tether
