#pragma once

#include <array>
#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>

#include "fields.h"

// Objectives from strings and numbers, for Python and command lines. An objective has
//   for_each_option(objective, visit)   visit(name, value, range) for its numbers
//   for_each_choice(objective, visit)   visit(name, value, names) for its enums

namespace tether {

// Objective or const Objective.
template <class T, class Objective>
concept SameBut = std::same_as<std::remove_const_t<T>, Objective>;

inline constexpr std::array<std::string_view, 2> kBoolNames{"false", "true"};

namespace detail {

[[noreturn]] inline void throw_unknown(std::string_view function, std::string_view what,
                                       const std::string& known, std::string_view got) {
  throw Error(std::string(function) + ": " + std::string(what) + " must be one of " + known +
              ", got \"" + std::string(got) + "\"");
}

inline void append(std::string& list, std::string_view name) {
  list += (list.empty() ? "" : ", ") + std::string(name);
}

}  // namespace detail

// Sets the number called `name`; an unknown name lists the known ones.
template <class Objective>
void set_option(std::string_view function, Objective& objective, std::string_view name,
                double value) {
  bool found = false;
  std::string known;
  for_each_option(objective, [&](std::string_view each, double& option, const Range& range) {
    detail::append(known, each);
    if (each != name) return;
    check_range(function, name, value, range);
    option = value;
    found = true;
  });
  if (!found) detail::throw_unknown(function, "option", known, name);
}

// Sets the choice called `name` to the one called `value`; unknown names list the known ones.
template <class Objective>
void set_choice(std::string_view function, Objective& objective, std::string_view name,
                std::string_view value) {
  bool found = false;
  std::string known;
  for_each_choice(objective,
                  [&]<class Enum>(std::string_view each, Enum& choice, const auto& names) {
                    detail::append(known, each);
                    if (each != name) return;
                    std::string values;
                    for (size_t i = 0; i < names.size() && !found; ++i) {
                      detail::append(values, names[i]);
                      if (names[i] != value) continue;
                      choice = static_cast<Enum>(i);
                      found = true;
                    }
                    if (!found) detail::throw_unknown(function, name, values, value);
                  });
  if (!found) detail::throw_unknown(function, "choice", known, name);
}

}  // namespace tether
