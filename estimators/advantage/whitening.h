#pragma once

#include <array>
#include <tuple>

#include "../../core/arguments.h"
#include "../../core/batch.h"
#include "../../core/macros.h"
#include "../../core/options.h"

namespace tether {

// Count, mean and sum of squared deviations of the values at active slots, mergeable over
// micro-batches and ranks (Chan, Golub, LeVeque 1979): never E[x^2] - mean^2, which cancels.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // With count - 1; 0 for fewer than two.
  TETHER_INLINE double variance() const { return count > 1 ? squares / (count - 1) : 0; }
  TETHER_INLINE Moments merged(const Moments& other) const {
    if (other.count == 0) return *this;
    if (count == 0) return other;
    const double n = count + other.count;
    const double gap = other.mean - mean;
    return {n, mean + gap * (other.count / n),
            squares + other.squares + gap * gap * (count * (other.count / n))};
  }
};

// Values [B, T] or [N].
template <class Array>
struct WhiteningInputs {
  LayoutOf<Array> layout = {};
  Array values = {};
  Array response_mask = {};

  static constexpr auto arguments() {
    using In = WhiteningInputs;
    using A = Argument<In, Array>;
    return std::array{A{"values", &In::values, Shape::elements},
                      A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask}};
  }
};
using WhiteningArrays = WhiteningInputs<ConstArray>;

// A finite value beyond this counts as this, whose square is a number.
inline constexpr double kLargestValue = 1e140;

// Of the values at slots of weight != 0; weights count.
Moments moments(const WhiteningArrays& batch);

struct Whitening {
  double epsilon = 1e-8;   // added to the variance, as in verl and TRL
  bool shift_mean = true;  // false: the mean stays where it is, only the spread becomes 1

  static constexpr auto fields() {
    return std::tuple{field("epsilon", &Whitening::epsilon, {0, largest_option})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("shift_mean", &Whitening::shift_mean)};
  }
};

//   x' = (x - mean) / sqrt(variance + epsilon) [+ mean]
//
// with the moments of the whole step, which the caller merges over micro-batches and ranks. Masked
// slots are not looked at and come out as 0; equal values give exactly 0 (peers leave padding at
// -mean / std, and one token gives NaN).
void whiten(const WhiteningArrays& batch, const Moments& step, const Whitening& options,
            const MutableArray& out);

}  // namespace tether
