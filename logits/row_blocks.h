#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../core/macros.h"
#include "lanes.h"
#include "lanes_avx512.h"
#include "statistics.h"

// The passes over a block of a row, by the instructions of the processor.

namespace tether::rows {

template <RowSums kSums, bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void sum_block(const Stored* logits, int64_t count,
                                             const Exponent<Real, kCapped>& exponent_in,
                                             BlockSums<Real>& out) {
  const auto exponent = exponent_in;
  Lanes<Real> lanes;
  clear<kSums>(lanes);
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(logits + i);
    add_lanes<kSums>(logits + i, exponent, lanes);
  }
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](Real a, Real b) { return a > b ? a : b; };
  out.exceeds = reduced<Real>(lanes.highest, larger) > kLargestExponent<Real>;
  out.largest = reduced<Real>(lanes.sum, larger);
  out.sum = reduced<double>(lanes.sum, add);
  if constexpr (kSums != RowSums::logp) out.weighted_sum = reduced<double>(lanes.weighted_sum, add);
  if constexpr (kSums == RowSums::all) {
    out.max = reduced<Real>(lanes.max, larger);
    out.sum_of_squares = reduced<double>(lanes.sum_of_squares, add);
    out.distances = reduced<double>(lanes.distances, add);
    out.columns = reduced<double>(lanes.columns, add);
  }
}

template <RowSums kSums, bool kCapped, class Stored, class Real = RealOf<Stored>>
BlockSums<Real> sums_of_block(const Block<Stored>& block, const Exponent<Real, kCapped>& exponent) {
  BlockSums<Real> out;
  if constexpr (avx512::kHas<Stored, kCapped>) {
    if (avx512::usable()) {
      avx512::sum_block<kSums>(block.logits, block.padded, exponent, out);
      return out;
    }
  }
  sum_block<kSums>(block.logits, block.padded, exponent, out);
  return out;
}

// The largest of `count` final logits.
template <bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES void largest_block(const Stored* logits, int64_t count,
                                 const FinalLogit<Real, kCapped>& final_logit_in, Real& out) {
  const auto final_logit = final_logit_in;
  Real largest[kRowLanes];
  for (Real& lane : largest) lane = -std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < count; i += kRowLanes) max_lanes(logits + i, final_logit, largest);
  out = reduced<Real>(largest, [](Real a, Real b) { return a > b ? a : b; });
}

// The first lanes with this logit, which is there.
template <class Stored, class Real = RealOf<Stored>>
TETHER_CLONES void lanes_of(const Stored* logits, Real logit, const Stored*& out) {
  for (;; logits += kRowLanes) {
    int count = 0;
    for (int i = 0; i < kRowLanes; ++i) count += widened<Real>(logits[i]) == logit ? 1 : 0;
    if (count != 0) break;
  }
  out = logits;
}

// The first column of a block with this logit, which is there.
template <class Stored, class Real>
int64_t column_of(const Block<Stored>& block, Real logit) {
  const Stored* lanes = nullptr;
  lanes_of(block.logits, logit, lanes);
  const auto is_it = [=](Stored stored) { return widened<Real>(stored) == logit; };
  return std::find_if(lanes, lanes + kRowLanes, is_it) - block.logits;
}

template <bool kCapped, class Stored, class Real = RealOf<Stored>>
TETHER_CLONES TETHER_CONTRACT void gradient_block(const Stored* logits, int64_t count,
                                                  const Exponent<Real, kCapped>& exponent_in,
                                                  const Slope<Real>& line_in, Stored* out) {
  const auto exponent = exponent_in;
  const auto line = line_in;
  for (int64_t i = 0; i < count; i += kRowLanes) {
    prefetch_ahead(logits + i);
    gradient_lanes(logits + i, exponent, line, out + i);
  }
}

template <bool kCapped, class Stored, class Real = RealOf<Stored>>
void gradients_of_block(const Block<Stored>& block, const Exponent<Real, kCapped>& exponent,
                        const Slope<Real>& line, Stored* out) {
  if constexpr (avx512::kHas<Stored, kCapped>) {
    if (avx512::usable()) {
      return avx512::gradient_block(block.logits, block.padded, exponent, line, out);
    }
  }
  gradient_block(block.logits, block.padded, exponent, line, out);
}

}  // namespace tether::rows
