#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tether {

// Sums in one fixed order, whatever the instruction set or the number of threads: element i goes to
// lane i mod 16, lanes are added pairwise. Partial sums are kept in double.
inline constexpr int kLanes = 16;

struct LaneSum {
  double lane[kLanes] = {};

  double total() const {
    double sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = lane[i];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
  }
};

}  // namespace tether
