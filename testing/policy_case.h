#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "policy_checks.h"

// A batch as plain numbers, which can be cut, permuted, printed and shrunk.

namespace tether::testing {

struct PolicyCase {
  int64_t rows = 0, columns = 0;
  // [rows * columns], row after row
  std::vector<double> logps = {}, old_logps = {}, ref_logps = {}, advantages = {};
  std::vector<double> response_mask = {};
  bool advantages_per_row = false;  // one value in each row, handed over as [B]

  size_t size() const { return static_cast<size_t>(rows * columns); }
  size_t index(int64_t row, int64_t column) const {
    return static_cast<size_t>(row * columns + column);
  }
  bool active(size_t i) const { return response_mask[i] != 0; }
  double log_ratio(size_t i) const { return logps[i] - old_logps[i]; }
};

using Indices = std::vector<int64_t>;
inline constexpr int64_t kPadding = -1;

// 0, 1, ..., count - 1
Indices all(int64_t count);

// These rows and columns, in this order; kPadding is a row or column of masked slots.
PolicyCase gathered(const PolicyCase& from, const Indices& rows, const Indices& columns);

// The reverse, for an array of values: each goes back to its slot, and adds up there.
std::vector<double> returned(const PolicyCase& to, const Indices& rows, const Indices& columns,
                             const std::vector<double>& values);

// The active tokens and rows.
Normalizer counts_of(const PolicyCase& batch);

// C++ that makes this batch.
std::string as_code(const PolicyCase& batch, const PolicyTraits& traits, at::ScalarType dtype);

class CaseGenerator {
 public:
  CaseGenerator(const PolicyTraits& traits, uint64_t seed) : traits_(traits), engine_(seed) {}

  // Ragged rows of every kind, log-ratios inside and outside of the usual clip regions but not at
  // their bounds, advantages with zeros among them. All numbers are float32.
  PolicyCase next(int64_t rows, int64_t columns);
  int64_t integer(int64_t low, int64_t high);  // inclusive

 private:
  double uniform(double low, double high);
  double log_ratio();
  double advantage();
  std::vector<double> row_mask(int64_t columns, bool fractional);

  const PolicyTraits& traits_;
  std::mt19937_64 engine_;
};

// One active token.
PolicyCase one_token(double logp, double old_logp, double ref_logp, double advantage);

}  // namespace tether::testing
