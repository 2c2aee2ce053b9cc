#include "estimators/advantage/whitening.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/fields.h"
#include "core/select.h"

namespace tether {
namespace {

// visit(row, column, count, weights, values) for every block.
template <class Visit>
void for_each_block(const WhiteningArrays& batch, Visit visit) {
  const RowLayout& layout = batch.layout;
  double weight[kBlock], value[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t length = layout.length(row);
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      load_block<double>(layout, batch.response_mask, row, column, count, nullptr, weight);
      load_block<double>(layout, batch.values, row, column, count, weight, value);
      for (int i = 0; i < count; ++i) value[i] = saturated(value[i], kLargestValue);
      visit(row, column, count, weight, value);
    }
  }
}

}  // namespace

Moments moments(const WhiteningArrays& batch) {
  check_inputs("moments", batch);
  check_weights("moments", batch.layout, batch.response_mask);
  // Deviations from the first active value: equal values have a variance of exactly 0.
  bool any = false;
  double first = 0, count = 0, sum = 0, squares = 0;
  const auto each_token = [&](auto visit) {
    for_each_block(batch,
                   [&](int64_t, int64_t, int size, const double* weight, const double* value) {
                     for (int i = 0; i < size; ++i) {
                       if (weight[i] != 0) visit(weight[i], value[i]);
                     }
                   });
  };
  each_token([&](double weight, double value) {
    if (!any) first = value;
    any = true;
    count += weight;
    sum += weight * (value - first);
  });
  if (count == 0) return {};
  const double shift = sum / count;
  each_token([&](double weight, double value) {
    const double deviation = (value - first) - shift;
    squares += weight * deviation * deviation;
  });
  return {count, first + shift, squares};
}

void whiten(const WhiteningArrays& batch, const Moments& step, const Whitening& options,
            const MutableArray& out) {
  check_fields("whiten", options);
  check_inputs("whiten", batch);
  check_given("whiten", "out", batch.layout, out);
  check_weights("whiten", batch.layout, batch.response_mask);
  const double spread = std::sqrt(step.variance() + options.epsilon);
  const bool equal = step.variance() == 0;
  const double scale = 1 / spread;
  const double centre = options.shift_mean ? 0 : step.mean;
  double result[kBlock];
  for_each_block(batch, [&](int64_t row, int64_t column, int count, const double* weight,
                            const double* value) {
    for (int i = 0; i < count; ++i) {
      const double gap = value[i] - step.mean;
      const double whitened = equal ? gap * 0 : gap * scale;  // NaN comes out
      result[i] = weight[i] != 0 ? whitened + centre : 0;
    }
    store_block(batch.layout, out, row, column, count, result);
  });
}

}  // namespace tether
