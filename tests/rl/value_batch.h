#pragma once

#include <limits>
#include <random>
#include <vector>

#include "rl/kernels/value_loss.h"
#include "tests/rl/policy_batch.h"

namespace tether {

// Rows of values that own their memory; masked slots hold NaN.
template <class T>
struct ValueRows {
  int64_t rows, columns;
  std::vector<T> values, old_values, returns, mask, dvalues;

  ValueRows(int64_t b, int64_t t) : rows(b), columns(t) {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    std::mt19937 random(2);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < b * t; ++i) {
      mask.push_back(random() % 4 != 0 ? T(1) : T(0));
      const T poison = mask.back() != 0 ? T(0) : kNaN;
      values.push_back(T(normal(random)) + poison);
      old_values.push_back(T(double(values.back()) + 0.3 * normal(random)) + poison);
      returns.push_back(T(normal(random)) + poison);
    }
    dvalues.assign(values.size(), kNaN);
  }
  ConstArray view(const std::vector<T>& array) const {
    return {array.data(), dtype<T>(), columns, 1};
  }
  ValueArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .values = view(values),
            .returns = view(returns),
            .response_mask = view(mask),
            .old_values = view(old_values)};
  }
  ValueTotals run(const ValueObjective& objective, const Normalizer& normalizer = {},
                  const Executor& executor = {}) {
    return value_loss(arrays(), objective, normalizer, {dvalues.data(), dtype<T>(), columns, 1},
                      executor);
  }
};

}  // namespace tether
