#include "estimators/advantage/catalogue.h"

#include <optional>

#include "core/check.h"

namespace tether {
namespace {

template <class Any, class Rows>
Any estimator_of(size_t index, const Rows& rows) {
  std::optional<Any> out;
  size_t each = 0;
  const auto visit = [&](const auto& row) {
    if (each++ == index) out = row.estimator;
  };
  std::apply([&](const auto&... row) { (visit(row), ...); }, rows);
  require(out.has_value(), [&] {
    return "advantage_estimator: row must be less than " + text(int64_t(each)) + ", got " +
           text(int64_t(index));
  });
  return *out;
}

template <class Any, class Rows>
size_t chosen_row(const Any& any, const Rows& rows) {
  size_t each = 0, found = std::tuple_size_v<Rows>;
  const auto visit = [&]<class Formula>(const AdvantageRow<Formula>&) {
    if (any.type() == typeid(Formula) && found == std::tuple_size_v<Rows>) found = each;
    ++each;
  };
  std::apply([&](const auto&... row) { (visit(row), ...); }, rows);
  return found;
}

}  // namespace

template <>
Recursion advantage_estimator<Recursion>(size_t row) {
  return estimator_of<Recursion>(row, kRecursionCatalogue);
}
template <>
GroupRule advantage_estimator<GroupRule>(size_t row) {
  return estimator_of<GroupRule>(row, kGroupCatalogue);
}

size_t chosen(const Recursion& recursion) { return chosen_row(recursion, kRecursionCatalogue); }
size_t chosen(const GroupRule& rule) { return chosen_row(rule, kGroupCatalogue); }

}  // namespace tether
