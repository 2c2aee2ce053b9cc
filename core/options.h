#pragma once

#include <array>
#include <concepts>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "fields.h"

// Options from strings and numbers, for Python and command lines. Whatever has options has
//   for_each_option(options, visit)   visit(name, value, range) for its numbers
//   for_each_choice(options, visit)   visit(name, value, names) for its enums, bools and formulas
// An option struct has them by listing its members in fields() and choices().

namespace tether {

inline constexpr std::array<std::string_view, 2> kBoolNames{"false", "true"};

// One choice of an option struct: its name, where it lives, the names of its values.
template <class Options, class Value, size_t kCount>
struct Choice {
  std::string_view name;
  Value Options::* member;
  const std::array<std::string_view, kCount>& names;
};

template <class Options, class Value, size_t kCount>
constexpr Choice<Options, Value, kCount> choice(std::string_view name, Value Options::* member,
                                                const std::array<std::string_view, kCount>& names) {
  return {name, member, names};
}
template <class Options>
constexpr Choice<Options, bool, 2> choice(std::string_view name, bool Options::* member) {
  return {name, member, kBoolNames};
}

template <class Options>
concept HasChoices = requires { Options::choices(); };
template <class Options>
concept OptionStruct =
    HasFields<std::remove_const_t<Options>> || HasChoices<std::remove_const_t<Options>>;

template <OptionStruct Options, class Visit>
void for_each_option(Options& options, Visit visit) {
  for_each_field(options, visit);
}

template <OptionStruct Options, class Visit>
void for_each_choice(Options& options, Visit visit) {
  using Plain = std::remove_const_t<Options>;
  if constexpr (HasChoices<Plain>) {
    std::apply(
        [&](const auto&... each) { (visit(each.name, options.*each.member, each.names), ...); },
        Plain::choices());
  }
}

// The value of a choice by the index of its name. A set of formulas has functions of its own
// (estimators/kl/catalogue.h).
template <class Value>
  requires(std::is_enum_v<Value> || std::same_as<Value, bool>)
void choose(Value& value, size_t index) {
  value = static_cast<Value>(index);
}
template <class Value>
  requires(std::is_enum_v<Value> || std::same_as<Value, bool>)
size_t chosen(Value value) {
  return static_cast<size_t>(value);
}

// Objective or const Objective.
template <class T, class Objective>
concept SameBut = std::same_as<std::remove_const_t<T>, Objective>;

namespace detail {

[[noreturn]] inline void throw_unknown(std::string_view function, std::string_view what,
                                       const std::string& known, std::string_view got) {
  const std::string rule = known.empty() ? " must not be given" : " must be one of " + known;
  throw Error(std::string(function) + ": " + std::string(what) + rule + ", got \"" +
              std::string(got) + "\"");
}

inline void append(std::string& list, std::string_view name) {
  list.append(list.empty() ? "" : ", ").append(name);
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
  for_each_choice(objective, [&](std::string_view each, auto& choice, const auto& names) {
    detail::append(known, each);
    if (each != name) return;
    std::string values;
    for (size_t i = 0; i < names.size() && !found; ++i) {
      detail::append(values, names[i]);
      if (names[i] != value) continue;
      choose(choice, i);
      found = true;
    }
    if (!found) detail::throw_unknown(function, name, values, value);
  });
  if (!found) detail::throw_unknown(function, "choice", known, name);
}

}  // namespace tether
