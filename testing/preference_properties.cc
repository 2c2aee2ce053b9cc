#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace preference;

// The sum of a row's log-ratios.
double score(const Case& batch, int64_t row) {
  double out = 0;
  for (int64_t column = 0; column < batch.columns; ++column) {
    const size_t i = batch.index(row, column);
    if (batch.active(i)) out += batch.response_mask[i] * (batch[kLogps][i] - batch[kRefLogps][i]);
  }
  return out;
}

// What a row says of itself, in an array of tokens.
double number_of(const Case& batch, size_t array, int64_t row) {
  double out = -infinity;
  for (int64_t column = 0; column < batch.columns; ++column) {
    const size_t i = batch.index(row, column);
    if (batch.active(i)) out = std::max(out, batch[array][i]);
  }
  return out;
}

// Where the rejected answer has the higher score, by whatever margin, chosen tokens become more
// likely and rejected ones rarer.
Failure check_pull_back(const Probe& probe, const Case& batch) {
  const Observed got = probe(batch);
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t chosen = row % batch.items(), rejected = chosen + batch.items();
    if (!(score(batch, chosen) < 0 && score(batch, rejected) > 0)) continue;
    if (number_of(batch, kBaselines, chosen) < number_of(batch, kBaselines, rejected)) continue;
    if (number_of(batch, kWeights, chosen) * number_of(batch, kWeights, rejected) == 0) continue;
    for (int64_t column = 0; column < batch.columns; ++column) {
      const size_t i = batch.index(row, column);
      if (!batch.active(i) || (row == chosen ? got.gradient[i] < 0 : got.gradient[i] > 0)) continue;
      return std::string(row == chosen ? "chosen" : "rejected") + " at a margin of " +
             text(score(batch, chosen) - score(batch, rejected)) + ", and a gradient of " +
             text(got.gradient[i]) + " at " + place(batch, i);
    }
  }
  return {};
}

// On a grid on which every difference is exact.
Failure check_shift(const Probe& probe, const Case& given) {
  Case batch = given, shifted = given;
  for (size_t array : {kLogps, kRefLogps}) {
    for (size_t i = 0; i < batch.size(); ++i) {
      batch[array][i] = std::round(batch[array][i] * 256) / 256;
      shifted[array][i] = batch[array][i] - 4;
    }
  }
  Observed want = probe(batch), got = probe(shifted);
  want.metrics.clear();  // log-probabilities are among them
  return probe.same("policy and reference lowered by 4", got, want);
}

std::string_view needs_log_ratio(const Subject& subject) {
  return subject.traits.is_function_of_log_ratio && subject.traits.needs_ref_logps
             ? ""
             : "the loss is not a function of log-ratios";
}

constexpr Property kProperties[] = {
    {"pull_back", "A pair in the wrong order has a gradient that puts it right", Batches::runaways,
     needs_pull, check_pull_back},
    {"shift", "A constant added to the log-probabilities of policy and reference changes nothing",
     Batches::small, needs_log_ratio, check_shift},
};

}  // namespace

std::span<const Property> preference_properties() { return kProperties; }

}  // namespace tether::testing
