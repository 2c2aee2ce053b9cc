#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tether::testing {

// What a loss gives: a scalar, and whatever it logs. From a plain tensor, or from what a loss of
// the library gives.
struct Result {
  at::Tensor loss;
  std::map<std::string, double> metrics = {};

  Result(at::Tensor loss, std::map<std::string, double> metrics = {});
  template <class Output>
    requires requires(const Output& output) { output.metrics.to_map(); }
  Result(const Output& output) : Result(output.loss, output.metrics.to_map()) {}
};

struct CheckOptions {
  uint64_t seed = 1;
  int batches = 12;  // random small ones; a few of fixed, larger shape are added
};

enum class Outcome { holds, fails, not_applicable };

struct PropertyReport {
  std::string id;         // "poison"
  std::string statement;  // what should hold, in one sentence
  Outcome outcome = Outcome::holds;
  std::string detail = {};  // fails: what differed; not applicable: why
  std::string batch = {};   // fails: the smallest failing input found, as C++
  int64_t rows = 0;         // of it
  int64_t columns = 0;
};

struct Report {
  CheckOptions options;
  std::vector<PropertyReport> properties;

  bool ok() const;  // nothing fails
  std::vector<std::string> failed() const;
  const PropertyReport& operator[](std::string_view id) const;
  std::string text() const;
};
std::ostream& operator<<(std::ostream& out, const Report& report);

}  // namespace tether::testing
