#include "estimators/advantage/gae.h"

#include "core/check.h"
#include "estimators/advantage/row_scan.h"

namespace tether {

void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor) {
  scan_rows("generalized_advantage_estimation", batch, options, advantages, returns, executor);
}

}  // namespace tether
