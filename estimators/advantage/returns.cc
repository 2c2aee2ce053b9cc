#include "estimators/advantage/returns.h"

#include <algorithm>

#include "core/check.h"
#include "core/fields.h"

namespace tether {

void discounted_returns(const ReturnsArrays& batch, const DiscountedReturns& options,
                        const MutableArray& returns) {
  const auto function = "discounted_returns";
  const RowLayout& layout = batch.layout;
  check_fields(function, options);
  check_inputs(function, batch);
  check_given(function, "returns", layout, returns);
  check_weights(function, layout, batch.response_mask);
  double weight[kBlock], reward[kBlock], out[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    double next = 0;
    bool in_response = false;  // not so in the padding after the last token
    if (batch.bootstrap) {
      load_block<double>(layout, batch.bootstrap, row, 0, 1, nullptr, out);
      next = out[0];
    }
    const int64_t length = layout.length(row);
    for (int64_t end = length; end > 0; end -= kBlock) {
      const int64_t column = std::max<int64_t>(0, end - kBlock);
      const int count = static_cast<int>(end - column);
      load_block<double>(layout, batch.response_mask, row, column, count, nullptr, weight);
      load_block<double>(layout, batch.rewards, row, column, count, weight, reward);
      for (int i = count - 1; i >= 0; --i) {
        const bool token = weight[i] != 0;
        in_response |= token;
        const bool step = token || (in_response && options.gap == MaskGap::decay);
        if (step) next = reward[i] + options.gamma * next;
        out[i] = token ? next : 0;
      }
      store_block<double>(layout, returns, row, column, count, out);
    }
  }
}

}  // namespace tether
