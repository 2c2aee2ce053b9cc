#include "estimators/advantage/returns.h"

#include <algorithm>

#include "core/check.h"
#include "core/fields.h"

namespace tether {

void discounted_returns(const RowLayout& layout, const ConstArray& rewards,
                        const ConstArray& response_mask, const ConstArray& bootstrap,
                        const DiscountedReturns& options, const MutableArray& returns) {
  const auto function = "discounted_returns";
  check_range(function, "gamma", options.gamma, Range{0, 1});
  check_layout(function, layout);
  check_given(function, "rewards", layout, rewards);
  check_given(function, "response_mask", layout, response_mask);
  check_array(function, "bootstrap", layout, bootstrap);
  check_given(function, "returns", layout, returns);
  double weight[kBlock], reward[kBlock], out[kBlock];
  for (int64_t row = 0; row < layout.rows; ++row) {
    double next = 0;
    bool in_response = false;  // not so in the padding after the last token
    if (bootstrap) {
      load_block<double>(layout, bootstrap, row, 0, 1, nullptr, out);
      next = out[0];
    }
    const int64_t length = layout.length(row);
    for (int64_t end = length; end > 0; end -= kBlock) {
      const int64_t column = std::max<int64_t>(0, end - kBlock);
      const int count = static_cast<int>(end - column);
      load_block<double>(layout, response_mask, row, column, count, nullptr, weight);
      load_block<double>(layout, rewards, row, column, count, weight, reward);
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
