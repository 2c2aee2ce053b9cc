#pragma once

#include <cstddef>
#include <cstring>
#include <tuple>

#include "catalogue.h"
#include "macros.h"

namespace tether {

// A formula of a list, by its place there, for kernels that have all of them. `List` is a
// std::tuple of formulas.
template <class List>
struct OneOf {
  static constexpr size_t kCount = std::tuple_size_v<List>;

  int index = 0;
  alignas(8) std::byte bytes[64] = {};

  // Of an AnyFormula (formula.h) with one of the list inside.
  template <class Any>
  explicit OneOf(const Any& any) {
    find<0>(any);
  }

  // call(formula)
  template <size_t kIndex = 0, class Call>
  TETHER_TEAM auto operator()(Call call) const {
    if constexpr (kIndex + 1 < kCount) {
      if (index != int{kIndex}) return operator()<kIndex + 1>(call);
    }
    std::tuple_element_t<kIndex, List> formula;
    std::memcpy(&formula, bytes, sizeof(formula));
    return call(formula);
  }

 private:
  template <size_t kIndex, class Any>
  void find(const Any& any) {
    using Formula = std::tuple_element_t<kIndex, List>;
    if (const Formula* formula = any.template target<Formula>()) {
      index = int{kIndex};
      std::memcpy(bytes, formula, sizeof(Formula));
    } else if constexpr (kIndex + 1 < kCount) {
      find<kIndex + 1>(any);
    }
  }
};

// The formulas of the rows of a catalogue, of which each is of a type of its own.
template <class... Formula>
std::tuple<Formula...> formulas_of(const std::tuple<FormulaRow<Formula>...>&);

}  // namespace tether
