#include "estimators/advantage/returns.h"

#include "estimators/advantage/row_scan.h"

namespace tether {

void discounted_returns(const ReturnsArrays& batch, const DiscountedReturns& options,
                        const MutableArray& returns) {
  const auto function = "discounted_returns";
  const AdvantageArrays rows{.layout = batch.layout,
                             .rewards = batch.rewards,
                             .response_mask = batch.response_mask,
                             .bootstrap = batch.bootstrap};
  check_inputs(function, batch);
  check_given(function, "returns", batch.layout, returns);
  scan_rows(function, rows, options, {}, returns);
}

}  // namespace tether
