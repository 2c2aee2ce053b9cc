#include "logits/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/macros.h"
#include "logits/lanes.h"
#include "logits/row_blocks.h"
#include "logits/shrink.h"
#include "logits/stored_rows.h"
#include "logits/stores.h"

namespace tether {
namespace {

using namespace rows;

// ---- rows ---------------------------------------------------------------------------------------

// The sum of the final logits above -inf of a block, which may be too far apart for Real.
template <class Stored>
double sum_of_logits(const Block<Stored>& block) {
  double sum = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    const double logit = widened<double>(block.logits[i]);
    if (logit != -infinity) sum += logit;
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
    row.max_logit = std::max(row.max_logit, final_logit(sums.max, options));
  }
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
    part = lone_column(final_logit(largest, options));
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

// With S = sum and m = weighted_sum / S, the mean of t under p:
//   p_v = 2^t_v / S,  log p_v + entropy = ln 2 (t_v - m)
//   dlogits_v = -p_v (dlogp + dentropy ln 2 (t_v - m)) k, plus dlogp k at the target, k: multiplier
Slope<double> slope_of_row(const RowStatistics& row, const RowUpstream& upstream,
                           const RowOptions& options) {
  const double weight = -multiplier(options) * outer_slope(options) / sum(row);
  const double slope = upstream.dentropy * std::numbers::ln2;
  const double mean = upstream.dentropy == 0 ? 0 : row.weighted_sum / sum(row);
  return {weight * (upstream.dlogp - slope * mean), weight * slope};
}

// Beside infinite gradients, what is not is nothing: those are so large that their products are not
// 0 in any type.
RowUpstream infinite_alone(const RowUpstream& upstream) {
  const auto each = [](double of) { return std::isinf(of) ? std::copysign(0x1p60, of) : 0 * of; };
  return {each(upstream.dlogp), each(upstream.dentropy)};
}

// The power of two that makes a line one of the loops, else 1.
template <class Real>
double shrink_of(const Slope<double>& line) {
  return shrink_to(std::max(std::abs(line.constant), std::abs(line.slope)), kLargestFactor<Real>);
}

// At the target, whose stored logit is given.
double gradient_of_target(const RowStatistics& row, const RowUpstream& upstream,
                          const RowOptions& options, double logit) {
  const double log_p = logp(row, options);
  double gradient = -upstream.dlogp * std::expm1(log_p);
  const double p = std::exp(log_p);
  if (upstream.dentropy != 0 && p != 0) gradient -= upstream.dentropy * p * (log_p + entropy(row));
  return gradient * multiplier(options) * final_slope(logit, options);
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

// What is 0 stays 0, by 0 too.
double divided(double gradient, double by) { return gradient == 0 ? 0 : gradient / by; }

template <class Stored>
void divide_row(const Output<Stored>& out, int64_t vocabulary, double by) {
  for (int64_t i = 0; i < vocabulary * out.stride; i += out.stride) {
    const double gradient = divided(widened<double>(out.row[i]), by);
    out.row[i] = narrowed<Stored>(static_cast<RealOf<Stored>>(gradient));
  }
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
    return {.reference = static_cast<Real>(reference),
            .scale = static_cast<Real>(multiplier(options) * std::numbers::log2e),
            .final_logit = FinalLogit<Real, kCapped>::of(options)};
  }

  RowStatistics statistics() const {
    const auto of = [&]<RowSums kSums>(std::integral_constant<RowSums, kSums>) {
      return statistics_of_row<kSums>(data, logits.vocabulary, logits.stride, exponent(0), options);
    };
    // Few caps are in use: one kind of sums is enough for them.
    RowStatistics out;
    if (kCapped || options.sums == RowSums::all) {
      out = of(std::integral_constant<RowSums, RowSums::all>{});
    } else if constexpr (!kCapped) {
      out = options.sums == RowSums::logp ? of(std::integral_constant<RowSums, RowSums::logp>{})
                                          : of(std::integral_constant<RowSums, RowSums::entropy>{});
    }
    if (target != kOutside) out.target_logit = final_logit(target_logit(), options);
    return out;
  }

  void write_gradient(const RowStatistics& sums, const RowUpstream& upstream_in,
                      const Output<Stored>& out) const {
    const bool infinite = std::isinf(upstream_in.dlogp) || std::isinf(upstream_in.dentropy);
    const RowUpstream upstream = infinite ? infinite_alone(upstream_in) : upstream_in;
    const bool present = target != kOutside && sums.target_logit != -infinity;
    const double logit = present ? target_logit() : 0;  // before it is overwritten
    const auto whole = slope_of_row(sums, upstream, options);
    const double shrink = shrink_of<Real>(whole);
    const Slope<Real> line = {bounded<Real>(whole.constant * shrink),
                              bounded<Real>(whole.slope * shrink)};
    auto exponent_of = exponent(sums.reference);
    exponent_of.least = least_exponent<Real>(line);
    // A small temperature multiplies the rounding of a cap.
    exponent_of.highest = static_cast<Real>(std::log2(sum(sums)));
    // A row that is NaN has no column that is absent.
    if (std::isnan(sum(sums))) exponent_of.reference = std::numeric_limits<Real>::quiet_NaN();
    gradient_of_row(data, logits.vocabulary, logits.stride, exponent_of, line, out);
    if (infinite || shrink < 1) divide_row(out, logits.vocabulary, infinite ? 0 : shrink);
    if (!present) return;
    const double slope = gradient_of_target(sums, upstream, options, logit);
    const auto gradient = static_cast<Real>(infinite ? divided(slope, 0) : slope);
    out.row[target * out.stride] = narrowed<Stored>(flushed(gradient));
  }
};

// ---- all rows -----------------------------------------------------------------------------------

// body.operator()<Stored, kCapped>() for the logits and options.
template <class Body>
void with_types(const char* function, DType dtype, const RowOptions& options, Body body) {
  with_stored_type(function, "logits", dtype, [&]<class Stored>(Stored) {
    return is_capped(options) ? body.template operator()<Stored, true>()
                              : body.template operator()<Stored, false>();
  });
}

// Stores past the caches pay when the gradient is somewhere else than the logits, large, and not of
// halves, whose rounding takes longer.
template <class Stored>
Output<Stored> output_of_row(const ConstLogits& logits, const MutableLogits& dlogits, int64_t row) {
  const bool apart = dlogits.data != logits.data;
  return {row_of<Stored>(dlogits, row), dlogits.stride,
          apart && is_large(dlogits) && dlogits.stride == 1 && sizeof(Stored) >= sizeof(float)};
}

}  // namespace

namespace rows {

void check_rows(std::string_view function, const ConstLogits& logits, const int64_t* targets,
                const RowOptions& options) {
  const std::string name(function);
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

}  // namespace rows

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
        logps[i] = logp_of(final_logit(widened<double>(data[ids[i] * logits.stride]), options));
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
        return fill_zero(out.row, logits.vocabulary, out.stride);
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
        return fill_zero(out.row, logits.vocabulary, out.stride);
      }
      in.write_gradient(statistics, upstream, out);
    });
  });
}

}  // namespace tether
