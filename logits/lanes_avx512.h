#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../core/half.h"
#include "../core/macros.h"
#include "lanes.h"

// The loops of logits/lanes.h in which most of a pass is spent, for processors with AVX-512. A
// compiler does not find two of its instructions: vreduceps leaves the fraction of t, exactly, and
// vscalefps multiplies by the power of two, with any overflow. With them 2^t takes seven
// instructions instead of nine, and sums that have overflowed tell what a maximum told.

#if defined(__x86_64__) && defined(__GNUC__) && \
    (!defined(TETHER_NO_CLONES) || (defined(__AVX512DQ__) && defined(__AVX512BW__)))
#define TETHER_AVX512 1
#include <immintrin.h>
#endif

namespace tether::rows::avx512 {

// What the loops below can do: no cap, float arithmetic.
#ifdef TETHER_AVX512
template <class Stored, bool kCapped>
inline constexpr bool kHas = !kCapped && !std::is_same_v<Stored, double>;
#else
template <class Stored, bool kCapped>
inline constexpr bool kHas = false;
#endif

// A block is done again when its sum exceeds this: no t is larger than 12 in the others, nor than 0
// when it is done again.
inline constexpr double kLargestSum = 2 * kRowBlock;

#ifdef TETHER_AVX512

#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC 12 takes the undefined operands in its own header for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define TETHER_AVX512_LOOP [[gnu::target("arch=x86-64-v4")]] TETHER_CONTRACT
#define TETHER_AVX512_INLINE [[gnu::target("arch=x86-64-v4"), gnu::always_inline]] inline

inline bool usable() {
  static const bool yes = __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return yes;
}

// kRowLanes numbers, in the order of widened_lanes.
struct Pair {
  __m512 halves[2];
};

TETHER_AVX512_INLINE Pair load(const float* in) {
  return {_mm512_loadu_ps(in), _mm512_loadu_ps(in + 16)};
}
TETHER_AVX512_INLINE Pair load(const BFloat16* in) {
  const __m512i pairs = _mm512_loadu_si512(in);
  const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(high)};
}
TETHER_AVX512_INLINE Pair load(const Float16* in) {
  const auto* halves = reinterpret_cast<const __m256i*>(in);
  return {_mm512_cvtph_ps(_mm256_loadu_si256(halves)),
          _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))};
}

TETHER_AVX512_INLINE void store(const Pair& from, float* out) {
  _mm512_storeu_ps(out, from.halves[0]);
  _mm512_storeu_ps(out + 16, from.halves[1]);
}
// To nearest, ties to even, in the upper halves. A NaN must be one whose lower half is 0.
TETHER_AVX512_INLINE __m512i rounded_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}
TETHER_AVX512_INLINE void store(const Pair& from, BFloat16* out) {
  const __m512i low = _mm512_srli_epi32(rounded_to_bfloat16(from.halves[0]), 16);
  const __m512i high = rounded_to_bfloat16(from.halves[1]);
  _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAA, low, high));
}
TETHER_AVX512_INLINE void store(const Pair& from, Float16* out) {
  auto* halves = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(halves, _mm512_cvtps_ph(from.halves[0], _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(from.halves[1], _MM_FROUND_TO_NEAREST_INT));
}

// Degree 5 on [0, 1), relative error 1.4e-7 with its roundings and 2^0 = 1 exactly. From -infinity
// to +infinity.
TETHER_AVX512_INLINE __m512 exp2(__m512 t) {
  const __m512 fraction = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 mantissa = _mm512_set1_ps(0x1.e97504p-10f);
  for (const float c : {0x1.27785cp-7f, 0x1.c91ce4p-5f, 0x1.ebdb5ap-3f, 0x1.62e4bap-1f, 1.0f}) {
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(mantissa, t);
}

// t and 2^t of x - reference; both 0 where the distance is below `least` and does not count.
struct Power {
  __m512 t, value;
  __mmask16 counts;
};

TETHER_AVX512_INLINE Power power_of(__m512 distance, __m512 scale, __m512 least) {
  const __mmask16 counts = _mm512_cmp_ps_mask(distance, least, _CMP_NLT_UQ);  // a NaN does
  const __m512 t = _mm512_maskz_mul_ps(counts, distance, scale);
  return {t, _mm512_maskz_mov_ps(counts, exp2(t)), counts};
}

TETHER_AVX512_INLINE __m512 flushed(__m512 gradient) {
  constexpr int kSubnormal = 0x20;
  const __mmask16 subnormal = _mm512_fpclass_ps_mask(gradient, kSubnormal);
  return _mm512_mask_mov_ps(gradient, subnormal, _mm512_setzero_ps());
}

TETHER_AVX512_INLINE double total(const Pair& lanes) {
  float numbers[kRowLanes];
  store(lanes, numbers);
  return reduced<double>(numbers, [](double a, double b) { return a + b; });
}

template <RowSums kSums, class Stored>
TETHER_AVX512_LOOP void sum_block(const Stored* logits, int64_t count,
                                  const Exponent<float, false>& row, BlockSums<float>& out) {
  const __m512 reference = _mm512_set1_ps(row.reference), scale = _mm512_set1_ps(row.scale);
  const __m512 least = _mm512_set1_ps(row.least / row.scale);
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
  const __m512 minus_infinity = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 least_root = _mm512_set1_ps(kLeastRoot<float>);
  const Pair none = {{zero, zero}};
  Pair sum = none, weighted_sum = none, sum_of_squares = none, distances = none, columns = none;
  Pair max = {{minus_infinity, minus_infinity}};
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(logits + i);
    const Pair in = load(logits + i);
    for (int h = 0; h < 2; ++h) {
      const __m512 x = in.halves[h];
      const __m512 distance = _mm512_sub_ps(x, reference);
      const auto [t, power, counts] = power_of(distance, scale, least);
      sum.halves[h] += power;
      if constexpr (kSums != RowSums::logp) weighted_sum.halves[h] += power * t;
      if constexpr (kSums == RowSums::all) {
        const __mmask16 present = _mm512_cmp_ps_mask(x, minus_infinity, _CMP_NEQ_UQ);
        const __mmask16 normal = _mm512_cmp_ps_mask(power, least_root, _CMP_NLT_UQ);
        sum_of_squares.halves[h] += _mm512_maskz_mul_ps(normal, power, power);
        distances.halves[h] += _mm512_maskz_mov_ps(present, distance);
        columns.halves[h] += _mm512_maskz_mov_ps(present, one);
        max.halves[h] = _mm512_max_ps(x, max.halves[h]);  // in this order a NaN is skipped
      }
    }
  }
  out.sum = total(sum);
  out.largest = _mm512_reduce_max_ps(_mm512_max_ps(sum.halves[0], sum.halves[1]));
  out.exceeds = out.sum > kLargestSum;
  if constexpr (kSums != RowSums::logp) out.weighted_sum = total(weighted_sum);
  if constexpr (kSums == RowSums::all) {
    out.sum_of_squares = total(sum_of_squares);
    out.distances = total(distances);
    out.columns = total(columns);
    out.max = _mm512_reduce_max_ps(_mm512_max_ps(max.halves[0], max.halves[1]));
  }
}

template <class Stored>
TETHER_AVX512_LOOP void gradient_block(const Stored* logits, int64_t count,
                                       const Exponent<float, false>& row, const Slope<float>& line,
                                       Stored* out) {
  // A NaN of anybody's making becomes one whose lower half is 0.
  const auto plain = [](float x) {
    return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x;
  };
  const __m512 reference = _mm512_set1_ps(row.reference), scale = _mm512_set1_ps(row.scale);
  const __m512 least = _mm512_set1_ps(row.least / row.scale);
  const __m512 constant = _mm512_set1_ps(plain(line.constant));
  const __m512 slope = _mm512_set1_ps(plain(line.slope));
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(logits + i);
    Pair x = load(logits + i);
    for (__m512& half : x.halves) {
      const auto [t, power, counts] = power_of(_mm512_sub_ps(half, reference), scale, least);
      half = flushed(_mm512_maskz_mul_ps(counts, power, _mm512_fmadd_ps(slope, t, constant)));
    }
    store(x, out + i);
  }
}

#pragma GCC diagnostic pop

#else

inline bool usable() { return false; }

template <RowSums kSums, class Stored>
void sum_block(const Stored* logits, int64_t count, const Exponent<float, false>& row,
               BlockSums<float>& out);
template <class Stored>
void gradient_block(const Stored* logits, int64_t count, const Exponent<float, false>& row,
                    const Slope<float>& line, Stored* out);

#endif

}  // namespace tether::rows::avx512
