#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "batch.h"
#include "select.h"

namespace tether {

// A number of a token within the bounds; NaN where it is not finite.
inline double bounded_or_nan(double x, double largest) { return bounded(x, largest) + 0 * x; }

// visit(weight, number...) for every active token of a row, in double, in their order: a number for
// each of the arrays.
template <class Visit, class... Array>
void for_each_active(const RowLayout& layout, int64_t row, const ConstArray& mask, Visit visit,
                     const Array&... arrays) {
  double weight[kBlock], numbers[sizeof...(arrays)][kBlock];
  const int64_t length = layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<double>(layout, mask, row, column, count, nullptr, weight);
    size_t which = 0;
    (load_block<double>(layout, arrays, row, column, count, weight, numbers[which++]), ...);
    for (int i = 0; i < count; ++i) {
      if (weight[i] == 0) continue;
      [&]<size_t... k>(std::index_sequence<k...>) {
        visit(weight[i], numbers[k][i]...);
      }(std::index_sequence_for<Array...>{});
    }
  }
}

}  // namespace tether
