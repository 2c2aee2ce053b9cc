#include "examples/text2sql/questions.h"

#include <algorithm>
#include <array>
#include <span>

#include "examples/text2sql/grammar_tables.h"
#include "examples/text2sql/projections.h"
#include "examples/text2sql/schema.h"

namespace text2sql {
namespace {

using tables::Base;
using tables::Filter;
using tables::Kind;
using tables::Step;

constexpr int kMostTables = 3;
constexpr size_t kFewest = 2, kMostExtra = 4;  // the k of first_k: 2 to 5
constexpr double kLogShare = 0.353, kRewardShare = 0.391;

std::vector<std::vector<Projection>> all_projections() {
  std::vector<std::vector<Projection>> all;
  for (const Base& base : tables::bases()) all.push_back(projections(base));
  return all;
}

const Base& base_of(const Composition& composition) {
  return tables::bases()[static_cast<size_t>(composition.base)];
}

const Projection& projection_of(const Composition& composition) {
  static const std::vector<std::vector<Projection>> kAll = all_projections();
  return kAll[static_cast<size_t>(composition.base)][static_cast<size_t>(composition.projection)];
}

const Filter& filter_of(const Composition& composition, size_t index) {
  return base_of(composition).filters[static_cast<size_t>(composition.filters[index])];
}

// Every path of the composition, a table once, in order of need.
std::vector<Step> steps(const Composition& composition) {
  std::vector<Step> result;
  const auto add = [&result](std::span<const Step> path) {
    for (const Step& step : path) {
      const auto same = [&step](const Step& known) { return known.table == step.table; };
      if (std::none_of(result.begin(), result.end(), same)) result.push_back(step);
    }
  };
  if (projection_of(composition).group == "department") add(base_of(composition).department);
  for (size_t i = 0; i < composition.filters.size(); ++i) add(filter_of(composition, i).path);
  return result;
}

bool to_many(const Composition& composition) {
  for (size_t i = 0; i < composition.filters.size(); ++i) {
    if (filter_of(composition, i).to_many) return true;
  }
  return false;
}

// Only these stay what the question means when rows are repeated and DISTINCT removes them.
bool bears_distinct(Kind kind) {
  return kind == Kind::list || kind == Kind::count || kind == Kind::named_column;
}

uint64_t hash(std::string_view text, uint64_t seed) {
  uint64_t state = Random::mix(seed + 1);
  for (const char c : text) state = Random::mix(state ^ static_cast<unsigned char>(c));
  return state;
}

Split split_of(const Composition& composition, std::string_view name, uint64_t seed) {
  if (composition.filters.empty()) return Split::log;
  Random random(hash(name, seed));
  if (random.chance(kLogShare)) return Split::log;
  return random.chance(kRewardShare / (1 - kLogShare)) ? Split::reward : Split::held_out;
}

// None, one, or two about different columns.
std::vector<std::vector<int>> filter_sets(std::span<const Filter> filters) {
  std::vector<std::vector<int>> sets = {{}};
  for (size_t i = 0; i < filters.size(); ++i) {
    sets.push_back({static_cast<int>(i)});
    for (size_t j = i + 1; j < filters.size(); ++j) {
      if (filters[i].column == filters[j].column) continue;
      sets.push_back({static_cast<int>(i), static_cast<int>(j)});
    }
  }
  return sets;
}

template <size_t N>
std::string_view any_of(const std::array<std::string_view, N>& choices, Random& random) {
  const auto used = std::count_if(choices.begin(), choices.end(),
                                  [](std::string_view choice) { return !choice.empty(); });
  return choices[random.below(static_cast<size_t>(used))];
}

std::string qualified(std::string_view table, std::string_view column) {
  return std::string(table) + "." + std::string(column);
}

// The text with every `mark` replaced by `with`.
std::string replaced(std::string_view text, std::string_view mark, std::string_view with) {
  std::string result;
  for (size_t at = 0; at < text.size();) {
    const bool here = text.substr(at, mark.size()) == mark;
    result += here ? with : text.substr(at, 1);
    at += here ? mark.size() : 1;
  }
  return result;
}

// Values near the ends of a domain match almost nothing or everything.
std::string filter_value(const Filter& filter, Random& random) {
  const Domain& values = domain(filter.column);
  const size_t margin = values.words.empty() ? values.size() / 8 : 0;
  return values.value(margin + random.below(values.size() - 2 * margin));
}

std::string aggregate_word(std::string_view aggregate, Random& random) {
  for (const tables::AggregateWords& each : tables::aggregate_words()) {
    if (each.aggregate == aggregate) return std::string(any_of(each.words, random));
  }
  return {};
}

void add_filters(const Composition& composition, Random& random, Query& query, std::string& text) {
  for (size_t i = 0; i < composition.filters.size(); ++i) {
    const Filter& filter = filter_of(composition, i);
    const std::string value = filter_value(filter, random);
    const bool word = !domain(filter.column).words.empty();
    query.conditions.push_back({std::string(filter.column), std::string(filter.relation),
                                word ? "'" + value + "'" : value});
    text += i == 0 ? " " : " and ";
    text += replaced(any_of(filter.phrases, random), "#", value);
  }
}

std::string group_column(const Base& base, const Projection& projection) {
  if (projection.group.empty()) return {};
  return projection.group == "department" ? "dept.name" : qualified(base.table, projection.group);
}

std::vector<Query::Output> outputs(const Base& base, const Projection& projection, bool distinct) {
  const std::string label = qualified(base.table, base.label);
  const std::string column = qualified(base.table, projection.column);
  const std::string group = group_column(base, projection);
  const std::string aggregate(projection.aggregate);
  switch (projection.kind) {
    case Kind::column:
      return {{.column = column}};
    case Kind::named_column:
      return {{.column = label}, {.column = column}};
    case Kind::count:
      if (!distinct) return {{.column = "*", .aggregate = "COUNT"}};
      return {{.column = qualified(base.table, "id"), .aggregate = "COUNT", .distinct = true}};
    case Kind::aggregate:
      return {{.column = column, .aggregate = aggregate}};
    case Kind::count_by:
      return {{.column = group}, {.column = "*", .aggregate = "COUNT"}};
    case Kind::mean_by:
      return {{.column = group}, {.column = column, .aggregate = aggregate}};
    case Kind::list:
    case Kind::first:
    case Kind::first_k:
      break;
  }
  return {{.column = label}};
}

void project(const Base& base, const Projection& projection, bool distinct, Query& query) {
  query.outputs = outputs(base, projection, distinct);
  query.distinct = distinct && projection.kind != Kind::count;
  query.group_by = group_column(base, projection);
  if (projection.kind != Kind::first && projection.kind != Kind::first_k) return;
  query.order_by = qualified(base.table, projection.column);
  query.descending = projection.aggregate == "MAX";
}

std::string worded(const Base& base, const Projection& projection, std::string_view filters,
                   int limit, Random& random) {
  const auto wordings = tables::wordings();
  const auto wording = std::find_if(
      wordings.begin(), wordings.end(),
      [&projection](const tables::Wording& each) { return each.kind == projection.kind; });
  const std::string aggregate = aggregate_word(projection.aggregate, random);
  std::string text(any_of(wording->templates, random));
  text = replaced(text, "$P", base.plural);
  text = replaced(text, "$S", base.singular);
  text = replaced(text, "$L", base.label);
  text = replaced(text, "$C", projection.column);
  text = replaced(text, "$A", aggregate);
  text = replaced(text, "$B", aggregate);
  text = replaced(text, "$K", std::to_string(limit));
  text = replaced(text, "$G", projection.group);
  return replaced(text, "$F", filters);
}

}  // namespace

Grammar::Grammar(uint64_t seed) {
  for (size_t base = 0; base < tables::bases().size(); ++base) {
    const Base& table = tables::bases()[base];
    const auto sets = filter_sets(table.filters);
    for (size_t projection = 0; projection < projections(table).size(); ++projection) {
      for (const std::vector<int>& filters : sets) {
        Composition composition = {.base = static_cast<int>(base),
                                   .projection = static_cast<int>(projection),
                                   .filters = filters};
        composition.tables = 1 + static_cast<int>(steps(composition).size());
        if (composition.tables > kMostTables) continue;
        if (to_many(composition) && !bears_distinct(projection_of(composition).kind)) continue;
        composition.split = split_of(composition, name(composition), seed);
        compositions_.push_back(composition);
      }
    }
  }
}

std::string Grammar::name(const Composition& composition) const {
  std::string result(base_of(composition).table);
  result += " / " + projection_of(composition).name();
  for (size_t i = 0; i < composition.filters.size(); ++i) {
    result += (i == 0 ? " / " : ", ") + std::string(filter_of(composition, i).name);
  }
  return result;
}

Grammar::Draw Grammar::draw(const Composition& composition, Random& random) const {
  const Base& base = base_of(composition);
  const Projection& projection = projection_of(composition);
  Query query;
  query.from = base.table;
  for (const Step& step : steps(composition)) {
    query.joins.push_back(
        {std::string(step.table), std::string(step.left), std::string(step.right)});
  }
  std::string filters;
  add_filters(composition, random, query, filters);
  project(base, projection, to_many(composition), query);
  if (projection.kind == Kind::first) query.limit = 1;
  if (projection.kind == Kind::first_k) {
    query.limit = static_cast<int>(kFewest + random.below(kMostExtra));
  }
  return {worded(base, projection, filters, query.limit, random), query};
}

}  // namespace text2sql
