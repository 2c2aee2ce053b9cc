#include "rl/weight_catalogue.h"

#include <optional>
#include <string>

#include "core/options.h"

namespace tether {

WeightFormula weight_formula(std::string_view name) {
  std::optional<WeightFormula> out;
  std::string known;
  for_each_weight([&](const auto& row) {
    detail::append(known, row.name);
    if (row.name == name) out = row.defaults;
  });
  if (!out) detail::throw_unknown("weight_formula", "name", known, name);
  return *out;
}

}  // namespace tether
