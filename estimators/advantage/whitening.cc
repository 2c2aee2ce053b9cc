#include "estimators/advantage/whitening.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/fields.h"

namespace tether {
namespace {

// visit(row, column, count, weights, values) for every block.
template <class Visit>
void for_each_block(const RowLayout& layout, const ConstArray& values, const ConstArray& mask,
                    Visit visit) {
  double weight[kBlock], value[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t length = layout.length(row);
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      load_block<double>(layout, mask, row, column, count, nullptr, weight);
      load_block<double>(layout, values, row, column, count, weight, value);
      visit(row, column, count, weight, value);
    }
  }
}

void check_values(std::string_view function, const RowLayout& layout, const ConstArray& values,
                  const ConstArray& mask) {
  check_layout(function, layout);
  check_given(function, "values", layout, values);
  check_given(function, "response_mask", layout, mask);
}

}  // namespace

Moments Moments::merged(const Moments& other) const {
  if (other.count == 0) return *this;
  if (count == 0) return other;
  const double n = count + other.count;
  const double gap = other.mean - mean;
  return {n, mean + gap * (other.count / n),
          squares + other.squares + gap * gap * (count * (other.count / n))};
}

Moments moments(const RowLayout& layout, const ConstArray& values,
                const ConstArray& response_mask) {
  check_values("moments", layout, values, response_mask);
  // Deviations from the first active value: equal values have a variance of exactly 0.
  bool any = false;
  double first = 0, count = 0, sum = 0, squares = 0;
  const auto each_token = [&](auto visit) {
    for_each_block(layout, values, response_mask,
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

void whiten(const RowLayout& layout, const ConstArray& values, const ConstArray& response_mask,
            const Moments& step, const Whitening& options, const MutableArray& out) {
  check_range("whiten", "epsilon", options.epsilon, Range{0, largest_finite});
  check_values("whiten", layout, values, response_mask);
  check_given("whiten", "out", layout, out);
  const double spread = std::sqrt(step.variance() + options.epsilon);
  const bool equal = step.variance() == 0;
  const double scale = 1 / spread;
  const double centre = options.shift_mean ? 0 : step.mean;
  double result[kBlock];
  for_each_block(
      layout, values, response_mask,
      [&](int64_t row, int64_t column, int count, const double* weight, const double* value) {
        for (int i = 0; i < count; ++i) {
          const double gap = value[i] - step.mean;
          const double whitened = equal ? gap * 0 : gap * scale;  // NaN comes out
          result[i] = weight[i] != 0 ? whitened + centre : 0;
        }
        store_block(layout, out, row, column, count, result);
      });
}

}  // namespace tether
