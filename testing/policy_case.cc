#include "testing/policy_case.h"

#include <array>
#include <cmath>
#include <sstream>

namespace tether::testing {

Indices all(int64_t count) {
  Indices out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int64_t>(i);
  return out;
}

PolicyCase gathered(const PolicyCase& from, const Indices& rows, const Indices& columns) {
  PolicyCase out{.rows = static_cast<int64_t>(rows.size()),
                 .columns = static_cast<int64_t>(columns.size()),
                 .advantages_per_row = from.advantages_per_row};
  for (int64_t row : rows) {
    for (int64_t column : columns) {
      const bool inside = row != kPadding && column != kPadding;
      const size_t i = inside ? from.index(row, column) : 0;
      const bool shared = from.advantages_per_row && row != kPadding && from.columns > 0;
      out.logps.push_back(inside ? from.logps[i] : -1);
      out.old_logps.push_back(inside ? from.old_logps[i] : -1);
      out.ref_logps.push_back(inside ? from.ref_logps[i] : -1);
      out.response_mask.push_back(inside ? from.response_mask[i] : 0);
      out.advantages.push_back(inside   ? from.advantages[i]
                               : shared ? from.advantages[from.index(row, 0)]
                                        : 0);
    }
  }
  return out;
}

std::vector<double> returned(const PolicyCase& to, const Indices& rows, const Indices& columns,
                             const std::vector<double>& values) {
  std::vector<double> out(to.size());
  size_t i = 0;
  for (int64_t row : rows) {
    for (int64_t column : columns) {
      if (row != kPadding && column != kPadding) out[to.index(row, column)] += values[i];
      ++i;
    }
  }
  return out;
}

Normalizer counts_of(const PolicyCase& batch) {
  double tokens = 0, sequences = 0;
  for (int64_t row = 0; row < batch.rows; ++row) {
    double row_tokens = 0;
    for (int64_t column = 0; column < batch.columns; ++column) {
      row_tokens += batch.response_mask[batch.index(row, column)];
    }
    tokens += row_tokens;
    sequences += row_tokens > 0 ? 1 : 0;
  }
  return {.policy = tokens, .kl = tokens, .sequences = sequences};
}

std::string as_code(const PolicyCase& batch, const PolicyTraits& traits, at::ScalarType dtype) {
  std::ostringstream out;
  out.precision(dtype == at::kDouble ? 17 : 9);
  const auto array = [&](const char* name, const std::vector<double>& values, bool per_row) {
    out << "    ." << name << " = at::tensor(std::vector<double>{";
    const size_t stride = per_row ? static_cast<size_t>(batch.columns) : 1;
    for (size_t i = 0; i < values.size(); i += stride) out << (i ? ", " : "") << values[i];
    out << "}, at::k" << dtype << ").view({" << batch.rows;
    if (!per_row) out << ", " << batch.columns;
    out << "}),\n";
  };
  out << "const tether::PolicyBatch batch{\n";
  array("logps", batch.logps, false);
  array("advantages", batch.advantages, batch.advantages_per_row && batch.columns > 0);
  array("response_mask", batch.response_mask, false);
  array("old_logps", batch.old_logps, false);
  if (traits.needs_ref_logps) array("ref_logps", batch.ref_logps, false);
  out << "};";
  return out.str();
}

double CaseGenerator::uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
}

int64_t CaseGenerator::integer(int64_t low, int64_t high) {
  const auto count = static_cast<uint64_t>(high - low + 1);
  return low + static_cast<int64_t>(engine_() % count);
}

// Bounds of clip regions in use lie between 0.15 and 0.4: log 1.2, log 0.8, log 1.28.
double CaseGenerator::log_ratio() {
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

double CaseGenerator::advantage() {
  switch (integer(0, 5)) {
    case 0:
      return 0;
    case 1:
      return 1;
    case 2:
      return uniform(-10, 10);
    default:
      return uniform(-2, 2);
  }
}

std::vector<double> CaseGenerator::row_mask(int64_t columns, bool fractional) {
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

PolicyCase CaseGenerator::next(int64_t rows, int64_t columns) {
  PolicyCase out{.rows = rows, .columns = columns};
  out.advantages_per_row = traits_.takes_row_advantages && integer(0, 1) == 0;
  const bool fractional = traits_.takes_fractional_mask && integer(0, 3) == 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> mask = row_mask(columns, fractional);
    const double shared = advantage();
    for (int64_t column = 0; column < columns; ++column) {
      const double logp = static_cast<float>(-uniform(0.05, 6));
      out.logps.push_back(logp);
      out.old_logps.push_back(static_cast<float>(logp - log_ratio()));
      out.ref_logps.push_back(static_cast<float>(logp + log_ratio()));
      out.advantages.push_back(static_cast<float>(out.advantages_per_row ? shared : advantage()));
      out.response_mask.push_back(mask[static_cast<size_t>(column)]);
    }
  }
  return out;
}

PolicyCase one_token(double logp, double old_logp, double ref_logp, double advantage) {
  return {.rows = 1,
          .columns = 1,
          .logps = {logp},
          .old_logps = {old_logp},
          .ref_logps = {ref_logp},
          .advantages = {advantage},
          .response_mask = {1}};
}

}  // namespace tether::testing
