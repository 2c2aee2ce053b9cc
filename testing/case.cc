#include "testing/case.h"

namespace tether::testing {
namespace {

// The rows of items: those of pairs lie half a batch apart.
Indices rows_of(const Case& batch, const Indices& items) {
  Indices out = items;
  if (!batch.pairs) return out;
  for (int64_t item : items) out.push_back(item == kPadding ? kPadding : item + batch.items());
  return out;
}

}  // namespace

Indices all(int64_t count) {
  Indices out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int64_t>(i);
  return out;
}

Case gathered(const Case& from, const Indices& items, const Indices& columns) {
  const Indices rows = rows_of(from, items);
  Case out{.rows = static_cast<int64_t>(rows.size()),
           .columns = static_cast<int64_t>(columns.size()),
           .pairs = from.pairs,
           .per_row = from.per_row};
  out.arrays.resize(from.arrays.size());
  for (int64_t row : rows) {
    for (int64_t column : columns) {
      const bool inside = row != kPadding && column != kPadding;
      out.response_mask.push_back(inside ? from.response_mask[from.index(row, column)] : 0);
      for (size_t k = 0; k < from.arrays.size(); ++k) {
        const bool shared = from.per_row && k + 1 == from.arrays.size() && row != kPadding;
        const bool known = inside || (shared && from.columns > 0);
        out[k].push_back(known ? from[k][from.index(row, inside ? column : 0)] : -1);
      }
    }
  }
  return out;
}

std::vector<double> returned(const Case& to, const Indices& items, const Indices& columns,
                             const std::vector<double>& values) {
  std::vector<double> out(to.size());
  size_t i = 0;
  for (int64_t row : rows_of(to, items)) {
    for (int64_t column : columns) {
      if (row != kPadding && column != kPadding) out[to.index(row, column)] += values[i];
      ++i;
    }
  }
  return out;
}

Normalizer counts_of(const Case& batch) {
  double tokens = 0, first_tokens = 0, items = 0;
  for (int64_t item = 0; item < batch.items(); ++item) {
    double item_tokens = 0;
    for (int64_t row : rows_of(batch, {item})) {
      for (int64_t column = 0; column < batch.columns; ++column) {
        item_tokens += batch.response_mask[batch.index(row, column)];
      }
      if (row == item) first_tokens += item_tokens;
    }
    tokens += item_tokens;
    items += item_tokens > 0 ? 1 : 0;
  }
  return {.policy = tokens, .kl = first_tokens, .sequences = items};
}

double Random::uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
}

int64_t Random::integer(int64_t low, int64_t high) {
  const auto count = static_cast<uint64_t>(high - low + 1);
  return low + static_cast<int64_t>(engine_() % count);
}

// Bounds of clip regions in use lie between 0.15 and 0.4: log 1.2, log 0.8, log 1.28.
double Random::log_ratio() {
  switch (integer(0, 5)) {
    case 0:
      return 0;
    case 1:
      return uniform(-1e-3, 1e-3);
    case 2:
    case 3:
      return uniform(-0.15, 0.15);
    case 4:
      return uniform(0.4, 3);
    default:
      return uniform(-3, -0.4);
  }
}

std::vector<double> Random::row_mask(int64_t columns, bool fractional) {
  std::vector<double> out(static_cast<size_t>(columns));
  const int64_t kind = integer(0, 5);
  const int64_t one = integer(0, columns - 1);
  const int64_t first = kind == 4 ? integer(0, columns - 1) : 0;   // a prompt, or left padding
  const int64_t last = kind == 3 ? integer(1, columns) : columns;  // a shorter answer
  for (int64_t i = 0; i < columns; ++i) {
    double weight = i >= first && i < last ? 1 : 0;
    if (kind == 0) weight = 0;                          // an empty row
    if (kind == 1) weight = i == one ? 1 : 0;           // one token
    if (kind == 5) weight = integer(0, 2) > 0 ? 1 : 0;  // holes: tool output, say
    if (fractional && integer(0, 1) == 0) weight *= 0.25 * static_cast<double>(integer(0, 4));
    out[static_cast<size_t>(i)] = weight;
  }
  return out;
}

}  // namespace tether::testing
