#pragma once

#include "../../core/fields.h"
#include "../../core/macros.h"
#include "../token_weight.h"

namespace tether {

// The measures of one weight over the active tokens of a segment.
struct MeasureTotals {
  double n = 0, sum = 0, largest = -infinity, smallest = infinity;

  TETHER_INLINE void add(double w, double x) {
    n += w;
    sum += w * x;
    extend(x);
  }
  TETHER_INLINE void extend(double x) {
    largest = x > largest ? x : largest;
    smallest = x < smallest ? x : smallest;
  }
  TETHER_INLINE double reduced(Reduction reduction) const {
    const double trace = sum * 0;  // the extremes know no NaN
    switch (reduction) {
      case Reduction::sum:
        return sum;
      case Reduction::mean:
        return sum / n;
      case Reduction::min:
        return smallest + trace;
      case Reduction::max:
        return largest + trace;
    }
    return sum;
  }
};

}  // namespace tether
