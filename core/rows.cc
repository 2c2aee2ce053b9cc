#include "core/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/macros.h"
#include "core/row_lanes.h"
#include "core/row_lanes_avx512.h"
#include "core/stored_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tether {
namespace {

using namespace rows;

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

// ---- stores past the caches ---------------------------------------------------------------------

#if defined(__x86_64__)

[[gnu::target("avx512f")]] void store_lines_wide(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

void store_lines(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16) {
    const auto* word = reinterpret_cast<const __m128i*>(from + i);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(word));
  }
}

// Copies without reading what it overwrites into the caches; whole lines of 64 bytes.
void store_past_caches(const void* from, void* to, int64_t bytes) {
  static const bool wide = __builtin_cpu_supports("avx512f");
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const auto misaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  const int64_t head = std::min(misaligned, bytes);
  const int64_t lines = (bytes - head) & ~int64_t{63};
  std::memcpy(target, source, static_cast<size_t>(head));
  (wide ? store_lines_wide : store_lines)(source + head, target + head, lines);
  std::memcpy(target + head + lines, source + head + lines,
              static_cast<size_t>(bytes - head - lines));
}

// Before anybody else reads what was stored.
void finish_stores() { _mm_sfence(); }

#else

void store_past_caches(const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}
void finish_stores() {}

#endif

// ---- rows ---------------------------------------------------------------------------------------

double softcapped(double logit, const RowOptions& options) {
  if (options.softcap == 0 || logit == -infinity) return logit;
  return options.softcap * std::tanh(logit * options.scale / options.softcap);
}

// The sum of the final logits above -inf of a block, which may be too far apart for Real.
template <class Stored>
double sum_of_logits(const Block<Stored>& block) {
  double sum = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    const double logit = widened<double>(block.logits[i]);
    if (logit > -infinity) sum += logit;
  }
  return sum;
}

// Adds a block that has the reference of the row.
template <RowSums kSums, class Stored, class Real>
void add(const BlockSums<Real>& sums, const Block<Stored>& block, Real reference,
         const RowOptions& options, RowStatistics& row) {
  row.rest += sums.sum;
  if constexpr (kSums != RowSums::logp) {
    row.weighted_sum += sums.weighted_sum;
    if (std::isnan(sums.weighted_sum)) row.rest = sums.weighted_sum;
  }
  if constexpr (kSums == RowSums::all) {
    row.sum_of_squares += sums.sum_of_squares;
    row.logit_sum += std::isfinite(sums.distances) ? sums.distances + sums.columns * reference
                                                   : sum_of_logits(block);
    row.columns += sums.columns;
    row.max_logit = std::max(row.max_logit, softcapped(sums.max, options));
  }
}

// The first column of a block with this logit, which is there.
template <class Stored, class Real>
int64_t column_of(const Block<Stored>& block, Real logit) {
  const auto is_it = [=](Stored stored) { return widened<Real>(stored) == logit; };
  const Stored* lanes = block.logits;
  const auto hits = [&] {
    int count = 0;
    for (int i = 0; i < kRowLanes; ++i) count += is_it(lanes[i]) ? 1 : 0;
    return count;
  };
  while (hits() == 0) lanes += kRowLanes;
  return std::find_if(lanes, lanes + kRowLanes, is_it) - block.logits;
}

RowStatistics lone_column(double logit) {
  return {.reference = logit,
          .rest = 0,
          .sum_of_squares = 1,
          .logit_sum = logit,
          .columns = 1,
          .max_logit = logit};
}

// The statistics of a block with its largest logit for a reference: a column that is taken out
// before the others are added up.
template <RowSums kSums, bool kCapped, class Stored, class Real = RealOf<Stored>>
RowStatistics statistics_beside_largest(Block<Stored>& block, Exponent<Real, kCapped> exponent,
                                        const RowOptions& options) {
  Real largest;
  largest_block(block.logits, block.padded, FinalLogit<Real, false>{}, largest);
  RowStatistics part;
  if (std::isfinite(largest)) {
    block.take_out(column_of(block, largest));
    part = lone_column(softcapped(largest, options));
  } else if (largest > 0) {
    part.reference = infinity;  // whose distance from itself is NaN
  }
  exponent.reference = part.reference > -infinity ? static_cast<Real>(part.reference) : Real(0);
  add<kSums>(sums_of_block<kSums>(block, exponent), block, exponent.reference, options, part);
  return part;
}

template <RowSums kSums, bool kCapped, class Stored, class Real = RealOf<Stored>>
RowStatistics statistics_of_row(const Stored* logits, int64_t vocabulary, int64_t stride,
                                Exponent<Real, kCapped> exponent, const RowOptions& options) {
  constexpr double kNotAsked = std::numeric_limits<double>::quiet_NaN();
  RowStatistics row;
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    Block<Stored> block(logits, stride, begin, vocabulary);
    if (begin == 0) {
      // A guess: 2^t of the others keeps its last bits as long as they do not exceed it by much.
      largest_block(block.logits, kRowLanes, exponent.final_logit, exponent.reference);
      row.reference = exponent.reference;
    }
    exponent.reference = static_cast<Real>(row.reference);
    const auto sums = sums_of_block<kSums>(block, exponent);
    const bool outweighs = 2.0 * sums.largest > 1 + row.rest + sums.sum;
    if (sums.exceeds || outweighs || row.reference == -infinity) {
      const auto part = statistics_beside_largest<kSums>(block, exponent, options);
      row = begin == 0 ? part : merge(row, part, options);
    } else {
      add<kSums>(sums, block, exponent.reference, options, row);
    }
  }
  if constexpr (kSums == RowSums::logp) row.weighted_sum = kNotAsked;
  if constexpr (kSums != RowSums::all) {
    row.sum_of_squares = row.logit_sum = row.columns = row.max_logit = kNotAsked;
  }
  return row;
}

// dx / dlogit where x is what RowStatistics calls a logit.
double softcap_slope(double logit, const RowOptions& options) {
  if (options.softcap == 0) return 1;
  const double tanh = std::tanh(logit * options.scale / options.softcap);
  return (1 - tanh * tanh) * options.scale;
}

// Of x / T with respect to "logits".
double multiplier(const RowOptions& options) {
  return (options.softcap > 0 ? 1 : options.scale) / options.temperature;
}

double sum(const RowStatistics& row) { return 1 + row.rest; }

// With S = sum and m = weighted_sum / S, the mean of t under p:
//   p_v = 2^t_v / S,  log p_v + entropy = ln 2 (t_v - m)
//   dlogits_v = -p_v (dlogp + dentropy ln 2 (t_v - m)) k, plus dlogp k at the target, k: multiplier
template <class Real>
Slope<Real> slope_of_row(const RowStatistics& row, const RowUpstream& upstream,
                         const RowOptions& options) {
  const double scale = options.softcap > 0 ? options.scale : 1;
  const double weight = -multiplier(options) * scale / sum(row);
  const double slope = upstream.dentropy * std::numbers::ln2;
  const double mean = upstream.dentropy == 0 ? 0 : row.weighted_sum / sum(row);
  return {bounded<Real>(weight * (upstream.dlogp - slope * mean)), bounded<Real>(weight * slope)};
}

// At the target, whose stored logit is given.
double gradient_of_target(const RowStatistics& row, const RowUpstream& upstream,
                          const RowOptions& options, double logit) {
  const double log_p = logp(row, options);
  double gradient = -upstream.dlogp * std::expm1(log_p);
  const double p = std::exp(log_p);
  if (upstream.dentropy != 0 && p != 0) gradient -= upstream.dentropy * p * (log_p + entropy(row));
  return gradient * multiplier(options) * softcap_slope(logit, options);
}

// Where a gradient goes.
template <class Stored>
struct Output {
  Stored* row;
  int64_t stride;
  bool past_caches;
};

template <bool kCapped, class Stored, class Real = RealOf<Stored>>
void gradient_of_row(const Stored* logits, int64_t vocabulary, int64_t stride,
                     const Exponent<Real, kCapped>& exponent, const Slope<Real>& line,
                     const Output<Stored>& out) {
  alignas(64) Stored buffer[kRowBlock];
  for (int64_t begin = 0; begin < vocabulary; begin += kRowBlock) {
    const Block<Stored> block(logits, stride, begin, vocabulary);
    const bool direct = out.stride == 1 && block.padded == block.count && !out.past_caches;
    Stored* target = direct ? out.row + begin : buffer;
    gradients_of_block(block, exponent, line, target);
    if (direct) continue;
    if (out.past_caches) {
      store_past_caches(buffer, out.row + begin,
                        block.count * static_cast<int64_t>(sizeof(Stored)));
      continue;
    }
    for (int64_t i = 0; i < block.count; ++i) out.row[(begin + i) * out.stride] = buffer[i];
  }
  if (out.past_caches) finish_stores();
}

// One row of a batch in the types of its loops.
template <class Stored, bool kCapped>
struct Row {
  using Real = RealOf<Stored>;
  static constexpr int64_t kOutside = -1;

  const ConstLogits& logits;
  const RowOptions& options;
  const Stored* data;
  int64_t target;  // its column, or kOutside

  Row(const ConstLogits& all, const int64_t* targets, const RowOptions& row_options, int64_t row)
      : logits(all),
        options(row_options),
        data(row_of<Stored>(all, row)),
        target(targets == nullptr ? kOutside : targets[row] - row_options.first_id) {
    if (target < 0 || target >= all.vocabulary) target = kOutside;
  }

  double target_logit() const { return widened<double>(data[target * logits.stride]); }

  Exponent<Real, kCapped> exponent(double reference) const {
    Exponent<Real, kCapped> out{static_cast<Real>(reference),
                                static_cast<Real>(multiplier(options) * std::numbers::log2e)};
    if constexpr (kCapped) {
      out.final_logit = {bounded<Real>(options.scale / options.softcap),
                         static_cast<Real>(options.softcap)};
    }
    return out;
  }

  RowStatistics statistics() const {
    const auto of = [&]<RowSums kSums>(std::integral_constant<RowSums, kSums>) {
      return statistics_of_row<kSums>(data, logits.vocabulary, logits.stride, exponent(0), options);
    };
    // Few softcaps are in use: one kind of sums is enough for them.
    RowStatistics out;
    if (kCapped || options.sums == RowSums::all) {
      out = of(std::integral_constant<RowSums, RowSums::all>{});
    } else if constexpr (!kCapped) {
      out = options.sums == RowSums::logp ? of(std::integral_constant<RowSums, RowSums::logp>{})
                                          : of(std::integral_constant<RowSums, RowSums::entropy>{});
    }
    if (target != kOutside) out.target_logit = softcapped(target_logit(), options);
    return out;
  }

  void write_gradient(const RowStatistics& sums, const RowUpstream& upstream,
                      const Output<Stored>& out) const {
    const bool present = target != kOutside && sums.target_logit != -infinity;
    const double logit = present ? target_logit() : 0;  // before it is overwritten
    const auto line = slope_of_row<Real>(sums, upstream, options);
    auto exponent_of = exponent(sums.reference);
    exponent_of.least = least_exponent<Real>(line);
    gradient_of_row(data, logits.vocabulary, logits.stride, exponent_of, line, out);
    if (!present) return;
    const auto gradient = static_cast<Real>(gradient_of_target(sums, upstream, options, logit));
    out.row[target * out.stride] = narrowed<Stored>(flushed(gradient));
  }
};

// ---- all rows -----------------------------------------------------------------------------------

// body.operator()<Stored, kCapped>() for the logits and options.
template <class Body>
void with_types(const char* function, DType dtype, const RowOptions& options, Body body) {
  with_stored_type(function, "logits", dtype, [&]<class Stored>(Stored) {
    return options.softcap > 0 ? body.template operator()<Stored, true>()
                               : body.template operator()<Stored, false>();
  });
}

void check_rows(const char* function, const ConstLogits& logits, const int64_t* targets,
                const RowOptions& options) {
  const std::string name = function;
  check_fields(name, options);
  require(logits.vocabulary >= 1, [&] {
    return name + ": logits must have a vocabulary of at least 1, got " + text(logits.vocabulary);
  });
  const int64_t ids = options.ids > 0 ? options.ids : logits.vocabulary;
  require(options.first_id >= 0 && options.first_id <= ids - logits.vocabulary, [&] {
    return name + ": first_id must be in [0, " + text(ids - logits.vocabulary) + "], got " +
           text(options.first_id);
  });
  if (targets == nullptr) return;
  const int64_t bad = first_bad_target(targets, logits.rows, ids, options.ignore_index);
  require(bad == logits.rows, [&] {
    return name + ": targets must be in [0, " + text(ids) + ") or ignore_index " +
           text(options.ignore_index) + ", got " + text(targets[bad]) + " at [" + text(bad) + "]";
  });
}

bool is_ignored(const int64_t* targets, int64_t row, const RowOptions& options) {
  return targets != nullptr && targets[row] == options.ignore_index;
}

// Stores past the caches pay when the gradient is somewhere else than the logits, larger than what
// a core's cache would keep for the next reader, and not of halves, whose rounding takes longer.
constexpr int64_t kCacheBytes = int64_t{4} << 20;

template <class Stored>
Output<Stored> output_of_row(const ConstLogits& logits, const MutableLogits& dlogits, int64_t row) {
  const bool apart = dlogits.data != logits.data;
  const bool large =
      logits.rows * logits.vocabulary * static_cast<int64_t>(sizeof(Stored)) > kCacheBytes;
  return {row_of<Stored>(dlogits, row), dlogits.stride,
          apart && large && dlogits.stride == 1 && sizeof(Stored) >= sizeof(float)};
}

template <class Stored>
void fill_zero(const Output<Stored>& out, int64_t vocabulary) {
  for (int64_t i = 0; i < vocabulary; ++i) out.row[i * out.stride] = Stored{};
}

}  // namespace

ConstLogits strided_rows(const int64_t* sizes, const int64_t* strides, int64_t dimensions) {
  ConstLogits out{
      .rows = 1, .vocabulary = sizes[dimensions - 1], .stride = strides[dimensions - 1]};
  for (int64_t d = 0; d < dimensions - 1; ++d) out.rows *= sizes[d];
  if (out.rows == 0) return out;
  int levels = 0;
  int64_t inner = 1;  // rows in the dimensions seen so far, the last one first
  for (int64_t d = dimensions - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (levels == 0) {
      out.row_stride = strides[d];
      levels = 1;
    } else if (levels == 1 && strides[d] != inner * out.row_stride) {
      out.columns = inner;
      out.batch_stride = strides[d];
      levels = 2;
    } else if (levels == 2 && strides[d] != inner / out.columns * out.batch_stride) {
      return {};
    }
    inner *= sizes[d];
  }
  return out;
}

RowStatistics merge(const RowStatistics& a, const RowStatistics& b, const RowOptions& options) {
  if (a.reference < b.reference) return merge(b, a, options);
  constexpr double kNothing = -1100;  // 2^this is 0, times anything finite
  const double distance = a.reference == b.reference ? 0 : b.reference - a.reference;
  const double shift = std::max(distance * std::numbers::log2e * multiplier(options), kNothing);
  const double power = std::exp2(shift);
  return {.reference = a.reference,
          .rest = a.rest + sum(b) * power,
          .weighted_sum = a.weighted_sum + (b.weighted_sum + sum(b) * shift) * power,
          .target_logit = std::max(a.target_logit, b.target_logit),
          .sum_of_squares = a.sum_of_squares + b.sum_of_squares * power * power,
          .logit_sum = a.logit_sum + b.logit_sum,
          .columns = a.columns + b.columns,
          .max_logit = std::max(a.max_logit, b.max_logit)};
}

// Without a softcap no clamp to logp <= 0 <= entropy is needed: the reference is one of the logits,
// with t = 0, and the others exceed it by kLargestExponent at most. Without any logit both are
// inf - inf.
double logp(const RowStatistics& row, const RowOptions& options) {
  return LogpOf(row, options)(row.target_logit);
}

LogpOf::LogpOf(const RowStatistics& row, const RowOptions& options)
    : reference_(row.reference), multiplier_(multiplier(options)), log_sum_(std::log1p(row.rest)) {}

double entropy(const RowStatistics& row) {
  return std::max(std::log1p(row.rest) - std::numbers::ln2 * row.weighted_sum / sum(row), 0.0);
}

double sum_of_squared_p(const RowStatistics& row) {
  return row.sum_of_squares / (sum(row) * sum(row));
}

double mean_logit(const RowStatistics& row, const RowOptions& options) {
  return row.logit_sum / row.columns * multiplier(options);
}

bool target_is_largest(const RowStatistics& row) { return row.target_logit >= row.max_logit; }

int64_t first_bad_target(const int64_t* targets, int64_t rows, int64_t vocabulary,
                         int64_t ignore_index) {
  const auto legal = [=](int64_t id) { return (0 <= id && id < vocabulary) || id == ignore_index; };
  return std::find_if_not(targets, targets + rows, legal) - targets;
}

void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    RowStatistics* statistics, const Executor& executor) {
  check_rows("row_statistics", logits, targets, options);
  with_types("row_statistics", logits.dtype, options, [&]<class Stored, bool kCapped>() {
    for_each_row(logits, executor, [&](int64_t row) {
      statistics[row] = is_ignored(targets, row, options)
                            ? ignored_row()
                            : Row<Stored, kCapped>(logits, targets, options, row).statistics();
    });
  });
}

void row_logps(const ConstLogits& logits, const RowStatistics* statistics, const int64_t* ids,
               int64_t size, const RowOptions& options, double* logps, const Executor& executor) {
  check_rows("row_logps", logits, nullptr, options);
  const int64_t bad = first_bad_target(ids, logits.rows * size, logits.vocabulary, 0);
  require(bad == logits.rows * size, [&] {
    return "row_logps: ids must be in [0, " + text(logits.vocabulary) + "), got " + text(ids[bad]) +
           " at [" + text(bad / size) + ", " + text(bad % size) + "]";
  });
  with_stored_type("row_logps", "logits", logits.dtype, [&]<class Stored>(Stored) {
    for_each_row(logits, executor, [&](int64_t row) {
      const Stored* data = row_of<Stored>(logits, row);
      const LogpOf logp_of(statistics[row], options);
      for (int64_t i = row * size; i < (row + 1) * size; ++i) {
        logps[i] = logp_of(softcapped(widened<double>(data[ids[i] * logits.stride]), options));
      }
    });
  });
}

void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowStatistics* statistics, const double* dlogps, const double* dentropies,
                   const MutableLogits& dlogits, const Executor& executor) {
  check_rows("row_gradients", logits, targets, options);
  with_types("row_gradients", logits.dtype, options, [&]<class Stored, bool kCapped>() {
    for_each_row(logits, executor, [&](int64_t row) {
      const auto out = output_of_row<Stored>(logits, dlogits, row);
      const RowUpstream upstream{dlogps != nullptr ? dlogps[row] : 0,
                                 dentropies != nullptr ? dentropies[row] : 0};
      if (is_ignored(targets, row, options) || (upstream.dlogp == 0 && upstream.dentropy == 0)) {
        return fill_zero(out, logits.vocabulary);
      }
      Row<Stored, kCapped>(logits, targets, options, row)
          .write_gradient(statistics[row], upstream, out);
    });
  });
}

void row_losses(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                const RowLoss& loss, const MutableLogits& dlogits, const Executor& executor) {
  check_rows("row_losses", logits, targets, options);
  with_types("row_losses", logits.dtype, options, [&]<class Stored, bool kCapped>() {
    for_each_row(logits, executor, [&](int64_t row) {
      const auto out = output_of_row<Stored>(logits, dlogits, row);
      const bool ignored = is_ignored(targets, row, options);
      const Row<Stored, kCapped> in(logits, targets, options, row);
      const RowStatistics statistics = ignored ? ignored_row() : in.statistics();
      const RowUpstream upstream = loss.function(loss.argument, row, statistics);
      if (ignored || (upstream.dlogp == 0 && upstream.dentropy == 0)) {
        return fill_zero(out, logits.vocabulary);
      }
      in.write_gradient(statistics, upstream, out);
    });
  });
}

}  // namespace tether
