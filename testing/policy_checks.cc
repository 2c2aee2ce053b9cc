#include "testing/policy_checks.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <sstream>

#include "testing/policy_properties.h"

namespace tether::testing {
namespace {

// The batches of every kind, drawn once for all properties.
struct Drawn {
  std::vector<PolicyCase> small, shaped, bounds, runaways, large;

  Drawn(const PolicyTraits& traits, const CheckOptions& options) {
    CaseGenerator generator(traits, options.seed);
    small.push_back(one_token(-1, -1.1, -1.5, 1));
    small.push_back(generator.next(3, 5));
    for (int i = 0; i < options.batches; ++i) {
      const int64_t rows = generator.integer(1, 5);
      small.push_back(generator.next(rows, generator.integer(1, 9)));
    }
    shaped = small;
    shaped.push_back(generator.next(2, 37));
    shaped.push_back(generator.next(3, 1100));  // longer than the blocks that a loop may use
    large.push_back(generator.next(40, 1700));  // enough for several threads
    bounds = small;
    if (traits.clip) add_bounds(*traits.clip);
    runaways = small;
    add_runaways();
  }

  void add_bounds(const ClipRange& clip) {
    for (double bound : {1 - clip.low, 1 + clip.high}) {
      for (double ratio : {bound * 0.97, bound * 1.03}) {
        if (ratio <= 0) continue;
        for (double A : {-1.0, 1.0}) bounds.push_back(one_token(-1, -1 - std::log(ratio), -1, A));
      }
    }
  }

  void add_runaways() {
    for (double gap : {0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 3e38}) {
      for (double signed_gap : {gap, -gap}) {
        for (double A : {1.0, -1.0, 0.0, -0.0, 1e4, -1e4, 1e12, -1e12}) {
          runaways.push_back(one_token(-1, -1 - signed_gap, -1, A));
        }
        runaways.push_back(one_token(-1, -1, -1 - signed_gap, 0));
      }
    }
  }

  const std::vector<PolicyCase>& of(Batches batches) const {
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

Failure guarded(const Property& property, const Probe& probe, const PolicyCase& batch) {
  try {
    return property.check(probe, batch);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    return "it threw: " + what.substr(0, what.find('\n'));
  }
}

const char* name_of(at::ScalarType dtype) { return dtype == at::kDouble ? "float64" : "float32"; }

void report_failure(const Property& property, const Probe& probe, const PolicyCase& found,
                    PropertyReport& report) {
  const PolicyCase batch = shrunk(found, [&](const PolicyCase& candidate) {
    return guarded(property, probe, candidate).has_value();
  });
  report.outcome = Outcome::fails;
  report.detail = std::string(name_of(probe.dtype)) + ", [B, T] = [" + std::to_string(batch.rows) +
                  ", " + std::to_string(batch.columns) + "], " +
                  guarded(property, probe, batch).value_or("not every time");
  report.batch = as_code(batch, probe.traits, probe.dtype);
  report.rows = batch.rows;
  report.columns = batch.columns;
}

PropertyReport report_of(const Property& property, const PolicyLoss& loss,
                         const PolicyTraits& traits, const Drawn& drawn) {
  PropertyReport report{.id = std::string(property.id),
                        .statement = std::string(property.statement)};
  if (const std::string_view why = property.excluded(traits); !why.empty()) {
    report.outcome = Outcome::not_applicable;
    report.detail = why;
    return report;
  }
  for (at::ScalarType dtype : traits.dtypes) {
    const Probe probe(loss, traits, dtype);
    for (const PolicyCase& batch : drawn.of(property.batches)) {
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

PolicyReport check_policy_loss(const PolicyLoss& loss, const PolicyTraits& traits,
                               const CheckOptions& options) {
  PolicyReport report{.options = options, .properties = {}};
  const Drawn drawn(traits, options);
  for (const auto& group : {formula_properties(), aggregation_properties(), memory_properties()}) {
    for (const Property& property : group) {
      report.properties.push_back(report_of(property, loss, traits, drawn));
    }
  }
  return report;
}

bool PolicyReport::ok() const { return failed().empty(); }

std::vector<std::string> PolicyReport::failed() const {
  std::vector<std::string> out;
  for (const PropertyReport& each : properties) {
    if (each.outcome == Outcome::fails) out.push_back(each.id);
  }
  return out;
}

const PropertyReport& PolicyReport::operator[](std::string_view id) const {
  std::string known;
  for (const PropertyReport& each : properties) {
    if (each.id == id) return each;
    known += (known.empty() ? "" : ", ") + each.id;
  }
  throw Error("PolicyReport: property must be one of " + known + ", got \"" + std::string(id) +
              "\"");
}

std::string PolicyReport::text() const {
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

std::ostream& operator<<(std::ostream& out, const PolicyReport& report) {
  return out << report.text();
}

}  // namespace tether::testing
