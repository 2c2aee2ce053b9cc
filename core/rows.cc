#include "core/rows.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "core/check.h"
#include "core/macros.h"
#include "core/row_lanes.h"

#if defined(__GNUC__) && !defined(__clang__)
// Products are contracted here, unlike in formulas: 1.6 times the speed, and no sign or tie depends
// on the last bit.
#define TETHER_CONTRACT [[gnu::optimize("fp-contract=fast")]]
#else
#define TETHER_CONTRACT
#endif

namespace tether {
namespace {

using namespace rows;

constexpr int64_t kRowBlock = 2048;  // logits between two additions to the row's double sums

// A block is done again when a logit exceeds the reference by this much: 2^t keeps its last bits.
template <class Real>
constexpr Real kLargestExponent = 8;

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

template <class Real>
struct BlockSums {
  Real max;
  double sum;
  double weighted_sum;
};

template <class Stored>
TETHER_CLONES TETHER_CONTRACT void sum_block(const Stored* logits, int64_t count,
                                             const Exponent<RealOf<Stored>>& exponent_in,
                                             BlockSums<RealOf<Stored>>& out) {
  const auto exponent = exponent_in;
  Lanes<RealOf<Stored>> lanes;
  std::fill_n(lanes.max, kRowLanes, -std::numeric_limits<RealOf<Stored>>::infinity());
  std::fill_n(lanes.sum, kRowLanes, RealOf<Stored>(0));
  std::fill_n(lanes.weighted_sum, kRowLanes, RealOf<Stored>(0));
  for (int64_t i = 0; i < count; i += kRowLanes) add_lanes(logits + i, exponent, lanes);
  const auto add = [](double a, double b) { return a + b; };
  out.max = reduced<RealOf<Stored>>(lanes.max, [](auto a, auto b) { return a > b ? a : b; });
  out.sum = reduced<double>(lanes.sum, add);
  out.weighted_sum = reduced<double>(lanes.weighted_sum, add);
}

template <class Stored>
TETHER_CLONES TETHER_CONTRACT void gradient_block(const Stored* logits, int64_t count,
                                                  const Exponent<RealOf<Stored>>& exponent_in,
                                                  const Slope<RealOf<Stored>>& line_in,
                                                  Stored* out) {
  const auto exponent = exponent_in;
  const auto line = line_in;
  for (int64_t i = 0; i < count; i += kRowLanes) {
    gradient_lanes(logits + i, exponent, line, out + i);
  }
}

// ---- rows ---------------------------------------------------------------------------------------

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
        padded((count + kRowLanes - 1) / kRowLanes * kRowLanes) {
    if (stride == 1 && padded == count) return;
    for (int64_t i = 0; i < count; ++i) buffer[i] = logits[i * stride];
    std::fill(buffer + count, buffer + padded, minus_infinity<Stored>());
    logits = buffer;
  }
};

// A guess at the largest logit; finite, unless a logit is +inf.
template <class Stored>
RealOf<Stored> first_reference(const Stored* logits) {
  RealOf<Stored> reference = std::numeric_limits<RealOf<Stored>>::lowest();
  for (int i = 0; i < kRowLanes; ++i) {
    const auto logit = widened<RealOf<Stored>>(logits[i]);
    reference = logit > reference ? logit : reference;
  }
  return reference;
}

template <class Stored>
RowStatistics statistics_of_row(const Stored* logits, int64_t vocabulary, int64_t stride,
                                double temperature) {
  using Real = RealOf<Stored>;
  const Real scale = static_cast<Real>(std::numbers::log2e / temperature);
  RowStatistics row;
  Real reference = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> block(logits, stride, begin, vocabulary);
    if (begin == 0) reference = first_reference(block.logits);
    BlockSums<Real> sums;
    sum_block(block.logits, block.padded, {reference, scale}, sums);
    if ((sums.max - reference) * scale > kLargestExponent<Real>) {
      reference = sums.max;
      sum_block(block.logits, block.padded, {reference, scale}, sums);
    }
    row = merge(row, {reference, sums.sum, sums.weighted_sum}, temperature);
  }
  return row;
}

// With S = sum and m = weighted_sum / sum, the mean of t under p:
//   p_v = 2^t_v / S,  log p_v + entropy = ln 2 (t_v - m)
//   dlogits_v = -p_v (dlogp + dentropy ln 2 (t_v - m)) / T, plus dlogp / T at the target.
template <class Real>
Slope<Real> slope_of_row(const RowStatistics& row, double dlogp, double dentropy,
                         double temperature) {
  const double weight = -1 / (row.sum * temperature);
  const double slope = dentropy * std::numbers::ln2;
  return {static_cast<Real>(weight * (dlogp - slope * row.weighted_sum / row.sum)),
          static_cast<Real>(weight * slope)};
}

double gradient_of_target(const RowStatistics& row, double dlogp, double dentropy,
                          double temperature) {
  const double log_p = logp(row, temperature);
  const double p = std::exp(log_p);
  return (-dlogp * std::expm1(log_p) - dentropy * p * (log_p + entropy(row))) / temperature;
}

template <class Stored>
void gradient_of_row(const Stored* logits, int64_t vocabulary, int64_t stride,
                     const Exponent<RealOf<Stored>>& exponent, const Slope<RealOf<Stored>>& line,
                     Stored* out, int64_t out_stride) {
  Stored buffer[kRowBlock];
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> block(logits, stride, begin, vocabulary);
    const bool direct = out_stride == 1 && block.padded == block.count;
    Stored* target = direct ? out + begin : buffer;
    gradient_block(block.logits, block.padded, exponent, line, target);
    if (direct) continue;
    for (int64_t i = 0; i < block.count; ++i) out[(begin + i) * out_stride] = buffer[i];
  }
}

// ---- all rows -----------------------------------------------------------------------------------

// body(Stored{}) for the type of the logits.
template <class Body>
void with_stored_type(const char* function, DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    case DType::boolean:
    case DType::none:
      break;
  }
  throw Error(std::string(function) +
              ": logits must be float32, float64, bfloat16 or float16, got " +
              (dtype == DType::none ? "none" : "boolean"));
}

template <class Body>
void for_each_row(const ConstLogits& logits, const Executor& executor, Body body) {
  if (logits.rows == 0) return;
  const Chunks chunks = Chunks::of(logits.rows, logits.rows * logits.vocabulary);
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) body(row);
  });
}

void check_rows(const char* function, const ConstLogits& logits, const int64_t* targets,
                const RowOptions& options) {
  const std::string name = function;
  check_fields(name, options);
  require(logits.vocabulary >= 1, [&] {
    return name + ": logits must have a vocabulary of at least 1, got " + text(logits.vocabulary);
  });
  if (targets == nullptr) return;
  const int64_t bad =
      first_bad_target(targets, logits.rows, logits.vocabulary, options.ignore_index);
  require(bad == logits.rows, [&] {
    return name + ": targets must be in [0, " + text(logits.vocabulary) + ") or ignore_index " +
           text(options.ignore_index) + ", got " + text(targets[bad]) + " at [" + text(bad) + "]";
  });
}

// One column, which is the target: logp 0 and entropy 0 at any temperature.
constexpr RowStatistics kIgnored = {.reference = 0, .sum = 1, .weighted_sum = 0, .target_logit = 0};

RowStatistics rescaled(const RowStatistics& row, double reference, double temperature) {
  const double shift = (row.reference - reference) * std::numbers::log2e / temperature;
  if (shift == 0) return row;
  const double power = std::exp2(shift);
  return {reference, row.sum * power, (row.weighted_sum + row.sum * shift) * power,
          row.target_logit};
}

}  // namespace

RowStatistics merge(const RowStatistics& a, const RowStatistics& b, double temperature) {
  const double target_logit = a.target_logit > b.target_logit ? a.target_logit : b.target_logit;
  const double reference = std::max(a.reference, b.reference);
  const RowStatistics x = a.sum == 0 ? RowStatistics{} : rescaled(a, reference, temperature);
  const RowStatistics y = b.sum == 0 ? RowStatistics{} : rescaled(b, reference, temperature);
  return {reference, x.sum + y.sum, x.weighted_sum + y.weighted_sum, target_logit};
}

// No clamp to logp <= 0 <= entropy is needed: the reference is one of the logits, with t = 0, and
// the others exceed it by kLargestExponent at most. Without any logit both are inf - inf.
double logp(const RowStatistics& row, double temperature) {
  return (row.target_logit - row.reference) / temperature - std::log(row.sum);
}

double entropy(const RowStatistics& row) {
  return std::log(row.sum) - std::numbers::ln2 * row.weighted_sum / row.sum;
}

int64_t first_bad_target(const int64_t* targets, int64_t rows, int64_t vocabulary,
                         int64_t ignore_index) {
  const auto legal = [=](int64_t id) { return (0 <= id && id < vocabulary) || id == ignore_index; };
  return std::find_if_not(targets, targets + rows, legal) - targets;
}

void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    RowStatistics* statistics, const Executor& executor) {
  check_rows("row_statistics", logits, targets, options);
  with_stored_type("row_statistics", logits.dtype, [&]<class Stored>(Stored) {
    for_each_row(logits, executor, [&](int64_t row) {
      if (targets != nullptr && targets[row] == options.ignore_index) {
        statistics[row] = kIgnored;
        return;
      }
      const Stored* begin = static_cast<const Stored*>(logits.data) + logits.offset(row);
      statistics[row] =
          statistics_of_row(begin, logits.vocabulary, logits.stride, options.temperature);
      if (targets != nullptr) {
        statistics[row].target_logit = widened<double>(begin[targets[row] * logits.stride]);
      }
    });
  });
}

void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowStatistics* statistics, const double* dlogps, const double* dentropies,
                   const MutableLogits& dlogits, const Executor& executor) {
  check_rows("row_gradients", logits, targets, options);
  with_stored_type("row_gradients", logits.dtype, [&]<class Stored>(Stored) {
    using Real = RealOf<Stored>;
    const Real scale = static_cast<Real>(std::numbers::log2e / options.temperature);
    for_each_row(logits, executor, [&](int64_t row) {
      Stored* out = static_cast<Stored*>(dlogits.data) + dlogits.offset(row);
      const double dlogp = dlogps != nullptr ? dlogps[row] : 0;
      const double dentropy = dentropies != nullptr ? dentropies[row] : 0;
      const bool ignored = targets != nullptr && targets[row] == options.ignore_index;
      if (ignored || (dlogp == 0 && dentropy == 0)) {
        for (int64_t i = 0; i < logits.vocabulary; ++i) out[i * dlogits.stride] = Stored{};
        return;
      }
      const RowStatistics& sums = statistics[row];
      gradient_of_row(static_cast<const Stored*>(logits.data) + logits.offset(row),
                      logits.vocabulary, logits.stride, {static_cast<Real>(sums.reference), scale},
                      slope_of_row<Real>(sums, dlogp, dentropy, options.temperature), out,
                      dlogits.stride);
      if (targets == nullptr || sums.target_logit == -infinity) return;
      out[targets[row] * dlogits.stride] = narrowed<Stored>(
          static_cast<Real>(gradient_of_target(sums, dlogp, dentropy, options.temperature)));
    });
  });
}

}  // namespace tether
