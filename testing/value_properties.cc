#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace value;

// Without a gradient is the value that left the interval around the old one to the side of which
// the interval's end is farther from the return.
Failure check_clip(const Probe& probe, const Case& batch) {
  const Observed got = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    const double V = batch[kValues][i], R = batch[kReturns][i], old = batch[kOldValues][i];
    const double inside =
        std::clamp(V, old - probe.traits.clip->low, old + probe.traits.clip->high);
    const double farther = std::fabs(inside - R) - std::fabs(V - R);
    if (!batch.active(i) || (inside != V && std::fabs(farther) < 1e-3)) continue;
    const bool still = (inside != V && farther > 0) || V == R;
    if (still ? got.gradient[i] == 0 : got.gradient[i] * (V - R) > 0) continue;
    return "value " + text(V) + ", old " + text(old) + ", return " + text(R) +
           ", and a gradient of " + text(got.gradient[i]) + " at " + place(batch, i);
  }
  return {};
}

// Only differences of the three count; on a grid on which those are exact.
Failure check_shift(const Probe& probe, const Case& given) {
  Case batch = given, shifted = given;
  for (size_t array = 0; array < batch.arrays.size(); ++array) {
    for (size_t i = 0; i < batch.size(); ++i) {
      batch[array][i] = std::round(batch[array][i] * 256) / 256;
      shifted[array][i] = batch[array][i] - 4;
    }
  }
  return probe.close("values and returns lowered by 4", probe(shifted), probe(batch),
                     probe.magnitude(shifted));
}

constexpr Property kProperties[] = {
    {"clip", "The gradient pulls to the return, and is 0 exactly where the clipped error counts",
     Batches::bounds, needs_clip, check_clip},
    {"shift", "A constant added to values and returns changes nothing", Batches::small, never,
     check_shift},
};

}  // namespace

std::span<const Property> value_properties() { return kProperties; }

}  // namespace tether::testing
