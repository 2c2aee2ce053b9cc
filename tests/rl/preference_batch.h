#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "rl/kernels/preference_loss.h"
#include "tests/rl/policy_batch.h"

namespace tether {

// Ragged answers that own their memory, pairs unless they get labels; masked slots hold NaN.
template <class T>
struct PairRows {
  int64_t rows, columns;
  std::vector<T> logps, ref_logps, mask, dlogps;
  std::vector<T> nll_mask, labels, baselines, answer_weights;  // empty: none

  PairRows(int64_t pairs, int64_t t, unsigned seed = 1, double spread = 0.3)
      : rows(2 * pairs), columns(t) {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows * t; ++i) {
      mask.push_back(random() % 4 != 0 ? T(1) : T(0));
      const bool active = mask.back() != 0;
      const double logp = -1 - std::abs(normal(random));
      logps.push_back(active ? T(logp) : kNaN);
      ref_logps.push_back(active ? T(logp + spread * normal(random)) : kNaN);
    }
    dlogps.assign(logps.size(), kNaN);
  }
  ConstArray view(const std::vector<T>& array) const {
    return {array.data(), dtype<T>(), columns, 1};
  }
  ConstArray numbers_of_rows(const std::vector<T>& array) const {
    if (array.empty()) return {};
    return {.data = array.data(),
            .dtype = dtype<T>(),
            .row_stride = 1,
            .column_stride = 0,
            .per_row = true};
  }
  PreferenceArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .logps = view(logps),
            .ref_logps = view(ref_logps),
            .response_mask = view(mask),
            .nll_mask = nll_mask.empty() ? ConstArray{} : view(nll_mask),
            .labels = numbers_of_rows(labels),
            .baselines = numbers_of_rows(baselines),
            .answer_weights = numbers_of_rows(answer_weights)};
  }
  PreferenceTotals run(const PreferenceObjective& objective, const PairNormalizer& normalizer = {},
                       const Executor& executor = {}) {
    return preference_loss(arrays(), objective, normalizer, {dlogps.data(), dtype<T>(), columns, 1},
                           executor);
  }
  // The sum of a row's log-ratios, in double.
  double score(int64_t row) const {
    double sum = 0;
    for (int64_t t = 0; t < columns; ++t) {
      const size_t i = size_t(row * columns + t);
      if (mask[i] != 0) sum += double(logps[i]) - double(ref_logps[i]);
    }
    return sum;
  }
};

}  // namespace tether
