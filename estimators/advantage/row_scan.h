#pragma once

#include <string_view>

#include "../../core/parallel.h"
#include "recursion.h"

namespace tether {

// Any recursion over the rows of a batch, in double; errors begin with `function`. Either result
// may be absent. The same bits for every executor.
void scan_rows(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
               const MutableArray& advantages, const MutableArray& returns,
               const Executor& executor = {});

}  // namespace tether
