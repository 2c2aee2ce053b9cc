#pragma once

#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "check.h"

namespace tether {

inline constexpr double infinity = std::numeric_limits<double>::infinity();
inline constexpr double largest_finite = std::numeric_limits<double>::max();  // any finite number
inline constexpr double largest_option = 1e12;  // of a finite one: e^60 times it is a float

// An interval of legal values, closed unless `above`: then low itself is not in it.
struct Range {
  double low = -infinity;
  double high = infinity;
  bool above = false;

  constexpr bool contains(double value) const {
    return (above ? low < value : low <= value) && value <= high;
  }
};

inline std::string text(const Range& range) {
  if (range.low == -largest_finite && range.high == largest_finite) return "finite";
  if (range.low == -infinity && range.high == infinity && !range.above) return "a number";
  if (range.high >= largest_finite) {
    const std::string low = (range.above ? "greater than " : "at least ") + text(range.low);
    return range.high == largest_finite ? low + " and finite" : low;
  }
  return (range.above ? "in (" : "in [") + text(range.low) + ", " + text(range.high) + "]";
}

// One option of an option struct: its name, where it lives, what is legal. An option struct lists
// its options once, in fields(); range checks, options by name and the documentation read that
// list.
template <class Options>
struct Field {
  std::string_view name;
  double Options::* member;
  Range range;
};

template <class Options>
constexpr Field<Options> field(std::string_view name, double Options::* member, Range range = {}) {
  return {name, member, range};
}

template <class Options>
concept HasFields = requires { Options::fields(); };

// visit(name, value, range) for every option; value is a reference into `options`.
template <class Options, class Visit>
void for_each_field(Options& options, Visit&& visit) {
  using Plain = std::remove_const_t<Options>;
  if constexpr (HasFields<Plain>) {
    std::apply(
        [&](const auto&... each) { (visit(each.name, options.*each.member, each.range), ...); },
        Plain::fields());
  }
}

inline void check_range(std::string_view function, std::string_view name, double value,
                        const Range& range) {
  require(range.contains(value), [&] {
    return std::string(function) + ": " + std::string(name) + " must be " + text(range) + ", got " +
           text(value);
  });
}

template <class Options>
void check_fields(std::string_view function, const Options& options) {
  for_each_field(options, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

}  // namespace tether
