#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <type_traits>

#include "../core/bit_cast.h"
#include "../core/half.h"
#include "../core/macros.h"
#include "../core/sum.h"
#include "final_logit.h"
#include "statistics.h"

// The innermost loops over rows of logits: kRowLanes at a time, of any type.

#if defined(__GNUC__) && !defined(__clang__)
// Products are contracted here, unlike in formulas: 1.6 times the speed, and no sign or tie depends
// on the last bit.
#define TETHER_CONTRACT [[gnu::optimize("fp-contract=fast")]]
#else
#define TETHER_CONTRACT
#endif

namespace tether::rows {

inline constexpr int kRowLanes = 32;  // independent sums

template <class Stored>
using RealOf = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

template <class Stored>
constexpr Stored minus_infinity() {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return {0xFF80u};
  } else if constexpr (std::is_same_v<Stored, Float16>) {
    return {0xFC00u};
  } else {
    return -std::numeric_limits<Stored>::infinity();
  }
}

// Asks for the logits that come a page after these kRowLanes: a processor fetches ahead by itself
// within a page only. 1.6 times the speed where memory answers late, nothing lost elsewhere; what
// lies behind the last row is asked for in vain.
template <class Stored>
TETHER_INLINE void prefetch_ahead(const Stored* logits) {
  constexpr int64_t kPage = 4096, kLine = 64;
  const auto* ahead = reinterpret_cast<const char*>(logits) + kPage;
  constexpr auto kBytes = static_cast<int64_t>(kRowLanes * sizeof(Stored));
  for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(ahead + i);
}

// ---- 2^t ----------------------------------------------------------------------------------------

template <class Real>
struct Exp2;

// Degree 5, relative error 4e-7 for |t| <= 8 and 2^0 = 1 exactly; more bits of 2^t do not show in
// the sums.
template <>
struct Exp2<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kRounder = 0x1.8p23f;
  static constexpr float kBias = 127;
  static constexpr float kLowest = -127;
  static constexpr float kLeast = -126;
  static constexpr std::array<float, 6> kCoefficients = {
      1.0f, 0x1.62e428p-1f, 0x1.ebf918p-3f, 0x1.c6b6e4p-5f, 0x1.3d0c52p-7f, 0x1.5c08e6p-10f};
};

// The Taylor polynomial of degree 13, truncated at 4e-18.
template <>
struct Exp2<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kBias = 1023;
  static constexpr double kLowest = -1023;
  static constexpr double kLeast = -1022;
  static constexpr std::array<double, 14> kCoefficients = [] {
    std::array<double, 14> coefficients = {1.0};
    for (std::size_t i = 1; i < coefficients.size(); ++i) {
      coefficients[i] = coefficients[i - 1] * std::numbers::ln2 / static_cast<double>(i);
    }
    return coefficients;
  }();
};

// 2^t for t from kLowest, where it is exactly 0, to the largest exponent; subnormal below kLeast.
// The power of two is added to the exponent as an integer, which costs less than a product, but
// keeps a NaN only if its low bits are 0; kAnyNan: a product, which keeps any.
template <bool kAnyNan = false, class Real>
TETHER_INLINE Real exp2_lean(Real t) {
  using E = Exp2<Real>;
  using Bits = typename E::Bits;
  constexpr Real kRounder = kAnyNan ? E::kRounder + E::kBias : E::kRounder;
  const Real shifted = t + kRounder;  // the low bits are round(t), + bias for a product
  const Real fraction = t - (shifted - kRounder);
  Real mantissa = E::kCoefficients.back();
  for (std::size_t i = E::kCoefficients.size() - 1; i-- > 0;) {
    mantissa = mantissa * fraction + E::kCoefficients[i];
  }
  const Bits power = bit_cast<Bits>(shifted) << E::kMantissa;
  return kAnyNan ? mantissa * bit_cast<Real>(power)
                 : bit_cast<Real>(bit_cast<Bits>(mantissa) + power);
}

// Its square is the smallest normal number.
template <class Real>
inline constexpr Real kLeastRoot = std::is_same_v<Real, double> ? Real(0x1p-511) : Real(0x1p-63);

// GCC would do what follows to both sides of a conditional expression, subnormal or not.
template <class Real>
TETHER_INLINE Real or_zero(Real value, bool condition) {
  using Bits = typename Exp2<Real>::Bits;
  return bit_cast<Real>(bit_cast<Bits>(value) & (condition ? ~Bits{0} : Bits{0}));
}

template <class Real>
struct Power {
  Real t;
  Real value;  // 2^t
};

// t = (x - reference) * scale. The difference comes first, so that a shift of the whole row
// cancels.
//   (x)       not below `lowest`, where 2^t is exactly 0: for sums, to which it matters little that
//             a few 2^t just above are subnormal. A variable because GCC splits the loop into two
//             cases where it sees the constant
//   power(x)  both 0 where t is below `least`: for products, of which many would be subnormal
// Arithmetic on subnormal numbers takes a hundred times as long.
template <class Real, bool kCapped>
struct Exponent {
  Real reference;
  Real scale;
  FinalLogit<Real, kCapped> final_logit = {};
  Real lowest = Exp2<Real>::kLowest;
  Real least = Exp2<Real>::kLeast;
  Real highest = Exp2<Real>::kBias;  // under a cap; of gradients log2 of the sum: no p is above 1

  TETHER_INLINE Real t(Real x) const { return (x - reference) * scale; }
  TETHER_INLINE Real operator()(Real x) const {
    const Real distance = t(x);
    return distance < lowest ? lowest : distance;
  }
  TETHER_INLINE Power<Real> power(Real x) const {
    const Real distance = t(x);
    const bool counts = !(distance < least);
    const Real kept = or_zero(distance, counts);
    return {kept, or_zero(exp2_lean(kept), counts)};
  }
};

// ---- blocks: kRowLanes logits at a time ---------------------------------------------------------

// Two neighbours as one word: shifts and masks instead of shuffles.
using BFloat16Pair [[gnu::may_alias, gnu::aligned(2)]] = uint32_t;

// kRowLanes logits as Real, in any fixed order: where they are, or in `buffer`.
template <class Stored>
TETHER_INLINE const RealOf<Stored>* widened_lanes(const Stored* in, RealOf<Stored>* buffer) {
  if constexpr (std::is_same_v<Stored, RealOf<Stored>>) {
    return in;
  } else if constexpr (std::is_same_v<Stored, BFloat16>) {
    const BFloat16Pair* pairs = reinterpret_cast<const BFloat16Pair*>(in);
// Else it is unrolled before the vectoriser sees it.
#pragma GCC unroll 1
    for (int i = 0; i < kRowLanes / 2; ++i) {  // VECTOR
      buffer[i] = bit_cast<float>(pairs[i] << 16);
      buffer[i + kRowLanes / 2] = bit_cast<float>(pairs[i] & 0xFFFF0000u);
    }
  } else {
    for (int i = 0; i < kRowLanes; ++i) buffer[i] = widened<RealOf<Stored>>(in[i]);  // VECTOR
  }
  return buffer;
}

// The reverse, in the same order.
template <class Stored>
TETHER_INLINE void narrow_lanes(const float* in, Stored* out) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    BFloat16Pair* pairs = reinterpret_cast<BFloat16Pair*>(out);
    for (int i = 0; i < kRowLanes / 2; ++i) {  // VECTOR
      const uint32_t high = to_bfloat16(in[i + kRowLanes / 2]);
      pairs[i] = high << 16 | to_bfloat16(in[i]);
    }
  } else {
    for (int i = 0; i < kRowLanes; ++i) out[i] = narrowed<Stored>(in[i]);  // VECTOR
  }
}

template <class Real>
struct Lanes {
  Real highest[kRowLanes];  // t
  Real sum[kRowLanes];
  Real weighted_sum[kRowLanes];
  // RowSums::all:
  Real sum_of_squares[kRowLanes];
  Real distances[kRowLanes];  // sum of x - reference
  Real columns[kRowLanes];
  Real max[kRowLanes];  // of the stored logits
};

template <RowSums kSums, class Real>
TETHER_INLINE void clear(Lanes<Real>& lanes) {
  for (int i = 0; i < kRowLanes; ++i) {
    lanes.highest[i] = -std::numeric_limits<Real>::infinity();
    lanes.sum[i] = lanes.weighted_sum[i] = Real(0);
    if constexpr (kSums == RowSums::all) {
      lanes.sum_of_squares[i] = lanes.distances[i] = lanes.columns[i] = Real(0);
      lanes.max[i] = -std::numeric_limits<Real>::infinity();
    }
  }
}

// The highest of the exponents t, not of the logits: a comparison of what the clamp has just made
// is one instruction.
template <RowSums kSums, bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void add_lanes(const Stored* logits, const Exponent<Real, kCapped>& exponent,
                             Lanes<Real>& lanes) {
  // The sum of power t notices every NaN; the low bits of a widened half are 0.
  constexpr bool kWatch = kSums == RowSums::logp && std::is_same_v<Stored, Real>;
  Real buffer[kRowLanes];
  const Real* in = widened_lanes(logits, buffer);
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const Real x = exponent.final_logit(in[i]);
    const Real t = exponent(x);
    const Real power = exp2_lean<kWatch>(t);
    lanes.highest[i] = t > lanes.highest[i] ? t : lanes.highest[i];
    lanes.sum[i] += power;
    if constexpr (kSums != RowSums::logp) lanes.weighted_sum[i] += power * t;
    if constexpr (kSums == RowSums::all) {
      const bool present = x != -std::numeric_limits<Real>::infinity();
      const Real root = or_zero(power, !(power < kLeastRoot<Real>));
      lanes.sum_of_squares[i] += root * root;
      lanes.distances[i] += present ? x - exponent.reference : Real(0);
      lanes.columns[i] += present ? Real(1) : Real(0);
      lanes.max[i] = in[i] > lanes.max[i] ? in[i] : lanes.max[i];
    }
  }
}

template <bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void max_lanes(const Stored* logits, const FinalLogit<Real, kCapped>& final_logit,
                             Real* largest) {
  Real buffer[kRowLanes];
  const Real* in = widened_lanes(logits, buffer);
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const Real x = final_logit(in[i]);
    largest[i] = x > largest[i] ? x : largest[i];
  }
}

// dx_v = 2^t_v (constant + slope * t_v), 0 where 2^t_v is
template <class Real>
struct Slope {
  Real constant;
  Real slope;
};

// Up to here a factor stays finite when it is added to a product with a t.
template <class Real>
inline constexpr double kLargestFactor =
    std::numeric_limits<Real>::max() / (Real(-2) * Exp2<Real>::kLowest);

// As Real, however large: 0 times it is 0.
template <class Real>
Real bounded(double factor) {
  constexpr double kBound = kLargestFactor<Real>;
  return static_cast<Real>(std::isfinite(factor) ? std::clamp(factor, -kBound, kBound) : factor);
}

// Or 0.
template <class Real>
TETHER_INLINE bool is_subnormal(Real gradient) {
  return std::abs(gradient) < std::numeric_limits<Real>::min();
}
// A gradient below the smallest normal number is 0.
template <class Real>
TETHER_INLINE Real flushed(Real gradient) {
  return or_zero(gradient, !is_subnormal(gradient));
}

// No gradient of a smaller t is above the smallest normal number.
template <class Real>
Real least_exponent(const Slope<Real>& line) {
  constexpr double kLeast = Exp2<Real>::kLeast;
  const double size = std::abs(double{line.constant}) - kLeast * std::abs(double{line.slope});
  return static_cast<Real>(std::max(kLeast, kLeast - std::log2(size)));
}

template <bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_INLINE void gradient_lanes(const Stored* logits, const Exponent<Real, kCapped>& exponent,
                                  const Slope<Real>& line, Stored* out) {
  constexpr bool kDirect = std::is_same_v<Stored, Real>;
  Real in_buffer[kRowLanes];
  Real out_buffer[kRowLanes];
  const Real* in = widened_lanes(logits, in_buffer);
  Real* dx = out_buffer;
  if constexpr (kDirect) dx = out;
#pragma GCC ivdep
  for (int i = 0; i < kRowLanes; ++i) {  // VECTOR
    const Real logit = in[i];
    const Real distance = exponent.t(exponent.final_logit(logit));
    const bool counts = !(distance < exponent.least);
    Real t = or_zero(distance, counts);
    if constexpr (kCapped) t = t > exponent.highest ? exponent.highest : t;
    Real gradient = exp2_lean(t) * (line.constant + line.slope * t);
    if constexpr (kCapped) gradient *= exponent.final_logit.slope(logit);
    dx[i] = or_zero(gradient, counts & !is_subnormal(gradient));
  }
  if constexpr (!kDirect) narrow_lanes(dx, out);
}

// ---- blocks of a row ---------------------------------------------------------------------------

inline constexpr int64_t kRowBlock = 2048;  // logits between two additions to the row's double sums

// A block is done again when a logit exceeds the reference by this much: 2^t keeps its last bits.
template <class Real>
inline constexpr Real kLargestExponent = 8;

// What one pass over a block adds up. Of what was not asked for nothing is known.
template <class Real>
struct BlockSums {
  bool exceeds;  // some t is too large for the last bits of the others
  Real max;      // stored logit
  Real largest;  // of the partial sums: no smaller than the largest 2^t
  double sum;
  double weighted_sum;
  double sum_of_squares;
  double distances;
  double columns;
};

// combine(a, b) over all lanes, pairwise.
template <class Number, class Real, class Combine>
TETHER_INLINE Number reduced(const Real* lanes, Combine combine) {
  Number numbers[kRowLanes];
  for (int i = 0; i < kRowLanes; ++i) numbers[i] = lanes[i];
  for (int width = kRowLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) numbers[i] = combine(numbers[i], numbers[i + width]);
  }
  return numbers[0];
}

// Columns [begin, begin + count) of a row, with columns that are not there up to whole lanes: where
// they are, or in `buffer`.
template <class Stored>
struct Block {
  const Stored* logits;
  int64_t count;
  int64_t padded;
  Stored buffer[kRowBlock];

  Block(const Stored* row, int64_t stride, int64_t begin, int64_t vocabulary)
      : logits(row + begin * stride),
        count(std::min(kRowBlock, vocabulary - begin)),
        padded(whole_lanes(count, int64_t{kRowLanes})) {
    if (stride == 1 && padded == count) return;
    for (int64_t i = 0; i < count; ++i) buffer[i] = logits[i * stride];
    std::fill(buffer + count, buffer + padded, minus_infinity<Stored>());
    logits = buffer;
  }

  void take_out(int64_t column) {
    if (logits != buffer) std::copy_n(logits, padded, buffer);
    buffer[column] = minus_infinity<Stored>();
    logits = buffer;
  }
};

}  // namespace tether::rows
