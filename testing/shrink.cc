#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

using Fails = std::function<bool(const Case&)>;

Indices without(int64_t count, int64_t first, int64_t last) {
  Indices out;
  for (int64_t i = 0; i < count; ++i) {
    if (i < first || i >= last) out.push_back(i);
  }
  return out;
}

// Drops half of the items or columns, then a quarter, ..., then single ones, while it still fails.
bool dropped(Case& batch, const Fails& fails, bool items) {
  bool any = false;
  for (int64_t size = items ? batch.items() : batch.columns; size > 0; size /= 2) {
    for (int64_t first = 0; first < (items ? batch.items() : batch.columns);) {
      const Case smaller =
          items ? gathered(batch, without(batch.items(), first, first + size), all(batch.columns))
                : gathered(batch, all(batch.items()), without(batch.columns, first, first + size));
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

// Plainer values for slot i of an array, the plainest first.
std::vector<double> plainer(const Family& family, const Case& batch, size_t array, size_t i) {
  const double value = batch[array][i], tenths = float(std::round(value * 10) / 10);
  if (array == family.id_array) return {};
  if (array == family.free_array) return {1, -1, std::round(value), tenths};
  if (array == 0) return {-1, tenths};
  return {batch[0][i], std::round(value), tenths};
}

// Whether slot i of an array, or of the mask, could take one of the values.
template <class Get>
bool took(Case& batch, const Fails& fails, const std::vector<double>& values, Get get) {
  for (double value : values) {
    if (get(batch) == value) return false;
    Case simpler = batch;
    get(simpler) = value;
    if (!fails(simpler)) continue;
    batch = simpler;
    return true;
  }
  return false;
}

bool simplified(const Family& family, Case& batch, const Fails& fails) {
  bool any = false;
  for (size_t i = 0; i < batch.size(); ++i) {
    any |= took(batch, fails, {1, 0}, [i](Case& of) -> double& { return of.response_mask[i]; });
  }
  for (size_t array = batch.arrays.size(); array-- > 0;) {
    for (size_t i = 0; i < batch.size(); ++i) {
      any |= took(batch, fails, plainer(family, batch, array, i),
                  [=](Case& of) -> double& { return of[array][i]; });
    }
  }
  return any;
}

}  // namespace

Case shrunk(const Family& family, Case batch, const Fails& fails) {
  int tries = 400;
  const Fails counted = [&](const Case& candidate) { return tries-- > 0 && fails(candidate); };
  Case per_token = batch;
  per_token.per_row = false;
  if (batch.per_row && counted(per_token)) batch = per_token;
  bool smaller = true;
  while (smaller && tries > 0) {
    smaller = dropped(batch, counted, true);
    smaller |= dropped(batch, counted, false);
    smaller |= !batch.per_row && simplified(family, batch, counted);
  }
  return batch;
}

}  // namespace tether::testing
