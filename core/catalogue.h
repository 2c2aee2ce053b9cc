#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>
#include <typeinfo>

namespace tether {

// One formula of the library, with its defaults, as a row of the list of its kind. A catalogue is a
// std::tuple of rows; names, choices, tables, benchmarks and tests are made from it.
template <class Formula>
struct FormulaRow {
  std::string_view name;
  Formula defaults;
  std::string_view formula;
  std::string_view paper;
  std::string_view header;
  std::string_view agreement;  // who computes the same in the tests
};

// visit(row) for every row.
template <class... Row, class Visit>
constexpr void for_each_row(const std::tuple<Row...>& rows, Visit visit) {
  std::apply([&](const auto&... row) { (visit(row), ...); }, rows);
}

template <class... Row>
constexpr auto names_of_rows(const std::tuple<Row...>& rows) {
  return std::apply([](const auto&... row) { return std::array{row.name...}; }, rows);
}

// A formula of any type as a choice among the rows (core/options.h).
template <class Any, class Rows>
void choose_row(Any& any, size_t index, const Rows& rows) {
  size_t each = 0;
  for_each_row(rows, [&](const auto& row) {
    if (each++ == index) any = row.defaults;
  });
}

// The first row of its type; of a user's own the number of rows.
template <class Any, class Rows>
size_t chosen_row(const Any& any, const Rows& rows) {
  constexpr size_t kNone = std::tuple_size_v<Rows>;
  size_t each = 0, found = kNone;
  for_each_row(rows, [&]<class Formula>(const FormulaRow<Formula>&) {
    if (found == kNone && any.type() == typeid(Formula)) found = each;
    ++each;
  });
  return found;
}

}  // namespace tether
