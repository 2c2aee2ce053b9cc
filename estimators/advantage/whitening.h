#pragma once

#include "../../core/batch.h"

namespace tether {

// Count, mean and sum of squared deviations of the values at active slots, mergeable over
// micro-batches and ranks (Chan, Golub, LeVeque 1979): never E[x^2] - mean^2, which cancels.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // With count - 1; 0 for fewer than two.
  double variance() const { return count > 1 ? squares / (count - 1) : 0; }
  Moments merged(const Moments& other) const;
};

// Of the values at slots of weight != 0; weights count.
Moments moments(const RowLayout& layout, const ConstArray& values, const ConstArray& response_mask);

struct Whitening {
  double epsilon = 1e-8;   // added to the variance, as in verl and TRL
  bool shift_mean = true;  // false: the mean stays where it is, only the spread becomes 1
};

//   x' = (x - mean) / sqrt(variance + epsilon) [+ mean]
//
// with the moments of the whole step, which the caller merges over micro-batches and ranks. Masked
// slots are not looked at and come out as 0; equal values give exactly 0 (peers leave padding at
// -mean / std, and one token gives NaN).
void whiten(const RowLayout& layout, const ConstArray& values, const ConstArray& response_mask,
            const Moments& step, const Whitening& options, const MutableArray& out);

}  // namespace tether
