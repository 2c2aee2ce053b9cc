#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "../rl/aggregation.h"

// A batch as plain numbers, which can be cut, permuted, printed and shrunk.

namespace tether::testing {

struct Case {
  int64_t rows = 0, columns = 0;
  bool pairs = false;    // rows of chosen answers, then as many of rejected ones
  bool per_row = false;  // the last array has one value in each row, handed over as [B]
  // [rows * columns], row after row; the arrays are those of the family (family.h).
  std::vector<double> response_mask = {};
  std::vector<std::vector<double>> arrays = {};

  size_t size() const { return static_cast<size_t>(rows * columns); }
  size_t index(int64_t row, int64_t column) const {
    return static_cast<size_t>(row * columns + column);
  }
  bool active(size_t i) const { return response_mask[i] != 0; }
  // What a batch is made of: rows, or pairs of them.
  int64_t items() const { return pairs ? rows / 2 : rows; }

  std::vector<double>& operator[](size_t array) { return arrays[array]; }
  const std::vector<double>& operator[](size_t array) const { return arrays[array]; }
};

using Indices = std::vector<int64_t>;
inline constexpr int64_t kPadding = -1;

// 0, 1, ..., count - 1
Indices all(int64_t count);

// These items and columns, in this order; kPadding is one of masked slots.
Case gathered(const Case& from, const Indices& items, const Indices& columns);

// The reverse, for an array of values: each goes back to its slot, and adds up there.
std::vector<double> returned(const Case& to, const Indices& items, const Indices& columns,
                             const std::vector<double>& values);

// The active tokens and items; of pairs kl is the tokens of the chosen answers.
Normalizer counts_of(const Case& batch);

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  double uniform(double low, double high);
  int64_t integer(int64_t low, int64_t high);  // inclusive

  // Inside and outside of the usual clip regions, not at their bounds.
  double log_ratio();

  // The weights of a row of any kind.
  std::vector<double> row_mask(int64_t columns, bool fractional);

 private:
  std::mt19937_64 engine_;
};

}  // namespace tether::testing
