#include "examples/text2sql/projections.h"

#include <array>

namespace text2sql {
namespace {

using tables::Kind;

constexpr std::array<std::string_view, 9> kKindNames = {"list",    "column",    "named_column",
                                                        "count",   "aggregate", "first",
                                                        "first_k", "count_by",  "mean_by"};

}  // namespace

std::string Projection::name() const {
  std::string result(kKindNames[static_cast<size_t>(kind)]);
  for (std::string_view part : {column, aggregate, group}) {
    if (!part.empty()) result.append(" ").append(part);
  }
  return result;
}

std::vector<Projection> projections(const tables::Base& base) {
  std::vector<std::string_view> columns(base.numbers.begin(), base.numbers.end());
  columns.push_back(base.category);
  std::vector<std::string_view> groups = {base.category};
  if (!base.department.empty()) groups.push_back("department");

  std::vector<Projection> all = {{.kind = Kind::list}, {.kind = Kind::count}};
  for (std::string_view column : columns) {
    all.push_back({.kind = Kind::column, .column = column});
    all.push_back({.kind = Kind::named_column, .column = column});
  }
  for (std::string_view number : base.numbers) {
    for (std::string_view aggregate : base.aggregates) {
      all.push_back({.kind = Kind::aggregate, .column = number, .aggregate = aggregate});
    }
    for (std::string_view extreme : {"MAX", "MIN"}) {
      all.push_back({.kind = Kind::first, .column = number, .aggregate = extreme});
      all.push_back({.kind = Kind::first_k, .column = number, .aggregate = extreme});
    }
    for (std::string_view group : groups) {
      all.push_back({.kind = Kind::mean_by, .column = number, .aggregate = "AVG", .group = group});
    }
  }
  for (std::string_view group : groups) all.push_back({.kind = Kind::count_by, .group = group});
  return all;
}

}  // namespace text2sql
