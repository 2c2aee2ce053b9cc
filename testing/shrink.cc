#include <algorithm>
#include <cmath>

#include "testing/policy_properties.h"

namespace tether::testing {
namespace {

using Fails = std::function<bool(const PolicyCase&)>;
using Array = std::vector<double> PolicyCase::*;

constexpr Array kArrays[] = {&PolicyCase::response_mask, &PolicyCase::ref_logps,
                             &PolicyCase::old_logps, &PolicyCase::advantages, &PolicyCase::logps};

Indices without(int64_t count, int64_t first, int64_t last) {
  Indices out;
  for (int64_t i = 0; i < count; ++i) {
    if (i < first || i >= last) out.push_back(i);
  }
  return out;
}

// Drops half of the rows or columns, then a quarter, ..., then single ones, while it still fails.
bool dropped(PolicyCase& batch, const Fails& fails, bool rows) {
  bool any = false;
  for (int64_t size = rows ? batch.rows : batch.columns; size > 0; size /= 2) {
    for (int64_t first = 0; first < (rows ? batch.rows : batch.columns);) {
      const PolicyCase smaller =
          rows ? gathered(batch, without(batch.rows, first, first + size), all(batch.columns))
               : gathered(batch, all(batch.rows), without(batch.columns, first, first + size));
      if (smaller.rows > 0 && smaller.columns > 0 && fails(smaller)) {
        batch = smaller;
        any = true;
      } else {
        first += size;
      }
    }
  }
  return any;
}

// Plainer values for slot i, the plainest first.
std::vector<double> plainer(const PolicyCase& batch, Array array, size_t i) {
  const double value = (batch.*array)[i];
  const double tenths = std::round(value * 10) / 10;
  if (array == &PolicyCase::response_mask) return {1, 0};
  if (array == &PolicyCase::advantages) return {1, -1, std::round(value), tenths};
  if (array == &PolicyCase::logps) return {-1, tenths};
  return {batch.logps[i], std::round(value), tenths};
}

bool simplified(PolicyCase& batch, const Fails& fails) {
  bool any = false;
  for (Array array : kArrays) {
    for (size_t i = 0; i < batch.size(); ++i) {
      for (double value : plainer(batch, array, i)) {
        const double before = (batch.*array)[i];
        if (value == before) break;
        PolicyCase simpler = batch;
        (simpler.*array)[i] = value;
        if (!fails(simpler)) continue;
        batch = simpler;
        any = true;
        break;
      }
    }
  }
  return any;
}

}  // namespace

PolicyCase shrunk(PolicyCase batch, const Fails& fails) {
  int tries = 400;
  const Fails counted = [&](const PolicyCase& candidate) {
    return tries-- > 0 && fails(candidate);
  };
  PolicyCase per_token = batch;
  per_token.advantages_per_row = false;
  if (batch.advantages_per_row && counted(per_token)) batch = per_token;
  bool smaller = true;
  while (smaller && tries > 0) {
    smaller = dropped(batch, counted, true);
    smaller |= dropped(batch, counted, false);
    smaller |= !batch.advantages_per_row && simplified(batch, counted);
  }
  return batch;
}

}  // namespace tether::testing
