#include <algorithm>
#include <exception>
#include <sstream>

#include "testing/properties.h"

namespace tether::testing {
namespace {

// The batches of every kind, drawn once for all properties.
struct Drawn {
  std::vector<Case> small, shaped, bounds, runaways, large;

  Drawn(const Subject& subject, const CheckOptions& options) {
    Random random(options.seed);
    const auto draw = [&](int64_t items, int64_t columns) {
      return subject.family.drawn(random, subject.traits, items, columns);
    };
    small.push_back(subject.family.simplest());
    small.push_back(draw(3, 5));
    for (int i = 0; i < options.batches; ++i) {
      const int64_t items = random.integer(1, 5);
      small.push_back(draw(items, random.integer(1, 9)));
    }
    shaped = small;
    shaped.push_back(draw(2, 37));
    shaped.push_back(draw(3, 1100));  // longer than the blocks that a loop may use
    large.push_back(draw(40, 1700));  // enough for several threads
    bounds = runaways = small;
    if (subject.traits.clip) append(bounds, subject.family.bounds(*subject.traits.clip));
    append(runaways, subject.family.runaways());
  }

  static void append(std::vector<Case>& to, const std::vector<Case>& more) {
    to.insert(to.end(), more.begin(), more.end());
  }

  const std::vector<Case>& of(Batches batches) const {
    switch (batches) {
      case Batches::small:
        return small;
      case Batches::shaped:
        return shaped;
      case Batches::bounds:
        return bounds;
      case Batches::runaways:
        return runaways;
      case Batches::large:
        return large;
    }
    return small;
  }
};

Failure guarded(const Property& property, const Probe& probe, const Case& batch) {
  try {
    return property.check(probe, batch);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    return "it threw: " + what.substr(0, what.find('\n'));
  }
}

const char* name_of(at::ScalarType dtype) { return dtype == at::kDouble ? "float64" : "float32"; }

void report_failure(const Property& property, const Probe& probe, const Case& found,
                    PropertyReport& report) {
  const Case batch = shrunk(probe.subject.family, found, [&](const Case& candidate) {
    return guarded(property, probe, candidate).has_value();
  });
  report.outcome = Outcome::fails;
  report.detail = std::string(name_of(probe.dtype)) + ", [B, T] = [" + std::to_string(batch.rows) +
                  ", " + std::to_string(batch.columns) + "], " +
                  guarded(property, probe, batch).value_or("not every time");
  report.batch = as_code(batch, probe.subject, probe.dtype);
  report.rows = batch.rows;
  report.columns = batch.columns;
}

PropertyReport report_of(const Property& property, const Subject& subject, const Drawn& drawn) {
  PropertyReport report{.id = std::string(property.id),
                        .statement = std::string(property.statement)};
  if (const std::string_view why = property.excluded(subject); !why.empty()) {
    report.outcome = Outcome::not_applicable;
    report.detail = why;
    return report;
  }
  for (at::ScalarType dtype : subject.traits.dtypes) {
    const Probe probe(subject, dtype);
    for (const Case& batch : drawn.of(property.batches)) {
      if (!guarded(property, probe, batch)) continue;
      report_failure(property, probe, batch, report);
      return report;
    }
  }
  return report;
}

std::string indented(const std::string& text) {
  std::string out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) out += "        " + line + "\n";
  return out;
}

}  // namespace

Report check(const Subject& subject, const CheckOptions& options) {
  Report report{.options = options, .properties = {}};
  const Drawn drawn(subject, options);
  for (const auto& group : {subject.family.properties(), gradient_properties(),
                            aggregation_properties(), memory_properties()}) {
    for (const Property& property : group) {
      report.properties.push_back(report_of(property, subject, drawn));
    }
  }
  return report;
}

bool Report::ok() const { return failed().empty(); }

std::vector<std::string> Report::failed() const {
  std::vector<std::string> out;
  for (const PropertyReport& each : properties) {
    if (each.outcome == Outcome::fails) out.push_back(each.id);
  }
  return out;
}

const PropertyReport& Report::operator[](std::string_view id) const {
  std::string known;
  for (const PropertyReport& each : properties) {
    if (each.id == id) return each;
    known += (known.empty() ? "" : ", ") + each.id;
  }
  throw Error("Report: property must be one of " + known + ", got \"" + std::string(id) + "\"");
}

std::string Report::text() const {
  std::ostringstream out;
  int holding = 0;
  for (const PropertyReport& each : properties) holding += each.outcome == Outcome::holds;
  out << holding << " properties hold, " << failed().size() << " fail, "
      << properties.size() - static_cast<size_t>(holding) - failed().size()
      << " do not apply (seed " << options.seed << ", " << options.batches << " random batches)\n";
  for (const PropertyReport& each : properties) {
    const char* mark = each.outcome == Outcome::holds   ? "ok    "
                       : each.outcome == Outcome::fails ? "FAILS "
                                                        : "-     ";
    out << mark << each.id << ": " << each.statement << ".\n";
    if (!each.detail.empty()) out << indented(each.detail);
    if (!each.batch.empty()) out << indented(each.batch);
  }
  return out.str();
}

std::ostream& operator<<(std::ostream& out, const Report& report) { return out << report.text(); }

}  // namespace tether::testing
