#include "logits/top_k_kl.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/macros.h"
#include "core/math.h"
#include "core/select.h"
#include "core/sum.h"
#include "logits/lanes.h"
#include "logits/stored_rows.h"

namespace tether {
namespace {

using namespace rows;

RowOptions row_options(const TopKKlOptions& options) {
  return {.temperature = options.temperature,
          .ignore_index = options.ignore_index,
          .sums = RowSums::logp};
}

// The first place of `ids` whose id stands there a second time, or `size`. seen: [V], all false
// before and afterwards.
int64_t first_repeated(const int64_t* ids, int64_t size, std::vector<bool>& seen) {
  int64_t place = 0;
  for (; place < size && !seen[size_t(ids[place])]; ++place) seen[size_t(ids[place])] = true;
  for (int64_t i = 0; i < place; ++i) seen[size_t(ids[i])] = false;
  return place;
}

bool is_ignored(const TopKHeads& heads, const TopKKlOptions& options, int64_t row) {
  return heads.targets != nullptr && heads.targets[row] == options.ignore_index;
}

// Throws Error about the ids of a row that is not ignored.
void check_row(const std::string& function, const TopKHeads& heads, const TopKKlOptions& options,
               int64_t row, std::vector<bool>& seen) {
  const int64_t vocabulary = heads.q.vocabulary, k = heads.size;
  const int64_t* ids = heads.ids + row * k;
  const auto place = [&](int64_t i) { return " at [" + text(row) + ", " + text(i) + "]"; };
  const int64_t bad = first_bad_target(ids, k, vocabulary, 0);
  require(bad == k, [&] {
    return function + ": head_ids must be in [0, " + text(vocabulary) + "), got " + text(ids[bad]) +
           place(bad);
  });
  const int64_t repeated = first_repeated(ids, k, seen);
  require(repeated == k, [&] {
    return function + ": head_ids must be all different in a row, got " + text(ids[repeated]) +
           " again" + place(repeated);
  });
  const int64_t* target = heads.targets == nullptr ? nullptr : heads.targets + row;
  require(target == nullptr || (0 <= *target && *target < vocabulary), [&] {
    return function + ": targets must be in [0, " + text(vocabulary) + ") or ignore_index " +
           text(options.ignore_index) + ", got " + text(*target) + " at [" + text(row) + "]";
  });
}

void check_heads(const std::string& function, const TopKHeads& heads, const TopKKlOptions& options,
                 const Executor& executor) {
  check_fields(function, options);
  const int64_t vocabulary = heads.q.vocabulary, rows = heads.q.rows;
  require(vocabulary >= 1, [&] {
    return function + ": q must have a vocabulary of at least 1, got " + text(vocabulary);
  });
  const bool sampled = heads.targets != nullptr && heads.p_target_logps != nullptr;
  require(!is_sampled(options.tail) || sampled || rows == 0, [&] {
    return function + ": targets and p_target_logps must be given for tail k1 and k3, got none";
  });
  if (rows == 0) return;
  // An error waits for the other chunks: the first row's is thrown.
  const Chunks chunks = Chunks::of(rows, rows * heads.size);
  std::vector<std::string> errors(static_cast<size_t>(chunks.count));
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    std::vector<bool> seen(static_cast<size_t>(vocabulary));
    try {
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        if (!is_ignored(heads, options, row)) check_row(function, heads, options, row, seen);
      }
    } catch (const Error& error) {
      errors[static_cast<size_t>(chunk)] = error.what();
    }
  });
  for (const std::string& error : errors) require(error.empty(), [&] { return error; });
}

// A divergence, and its derivatives by the log-probabilities that it is made of.
struct RowKl {
  double kl = 0;
  std::vector<double> head;  // [k]
  double target = 0;
  std::vector<double> q;  // the probabilities of the head
};

// That of the type of the results.
double saturation_of(DType dtype) {
  return dtype == DType::float64 ? kSaturation<double> : double{kSaturation<float>};
}

// Finite log-probabilities beyond this count as this: no difference of two is infinite.
constexpr double kFarthest = 1e290;

// +inf and NaN are not.
bool is_logp(double number) { return number < infinity; }

// Of a sample of q: NaN where q cannot have drawn it.
double drawn(double logp) {
  return logp == -infinity ? std::numeric_limits<double>::quiet_NaN() : logp;
}

// What the head of one row adds up to, [k] each.
struct HeadTerms {
  std::vector<double> kl, slopes;  // q u and its derivative by log q
  std::vector<double> q, p;

  explicit HeadTerms(int64_t k) : kl(static_cast<size_t>(k)), slopes(kl), q(kl), p(kl) {}
};

TETHER_CLONES void add_terms(const double* log_q, const double* log_p, int64_t size, double* kl,
                             double* slopes, double* q, double* p) {
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {  // VECTOR
    const auto term =
        head_kl(Dual<double>{log_q[i], 1}, Constant<double>{saturated(log_p[i], kFarthest)});
    kl[i] = term.value;
    slopes[i] = term.grad;
    q[i] = math::exp(log_q[i]);
    p[i] = math::exp(log_p[i]);
  }
}

HeadTerms head_terms(TailEstimate tail, const double* log_q, const double* log_p, int64_t k) {
  HeadTerms out(k);
  double *kl = out.kl.data(), *slopes = out.slopes.data(), *q = out.q.data(), *p = out.p.data();
  if (tail == TailEstimate::reverse_bucket) {
    add_terms(log_p, log_q, k, kl, slopes, p, q);
    std::transform(p, p + k, slopes, std::negate{});  // of p (log p - log q) by log q
  } else {
    add_terms(log_q, log_p, k, kl, slopes, q, p);
  }
  return out;
}

double sum(const std::vector<double>& values) {
  const size_t whole = values.size() / kLanes * kLanes;
  LaneSum lanes;
  for (size_t i = 0; i < whole; i += kLanes) lanes.add(values.data() + i);
  return std::accumulate(values.begin() + static_cast<int64_t>(whole), values.end(), lanes.total());
}

// Of all but one, not by subtraction.
double sum_without(std::vector<double>& values, size_t i) {
  const double kept = std::exchange(values[i], 0.0);
  const double out = sum(values);
  values[i] = kept;
  return out;
}

// Where more than half is, or the size.
size_t place_of_majority(const std::vector<double>& probabilities) {
  const auto begin = probabilities.begin(), end = probabilities.end();
  return static_cast<size_t>(std::find_if(begin, end, [](double p) { return p > 0.5; }) - begin);
}

// 1 less all probabilities: what a majority leaves of 1, less the others.
double mass_beside(std::vector<double>& probabilities, const double* logps) {
  const size_t majority = place_of_majority(probabilities);
  if (majority == probabilities.size()) return 1 - sum(probabilities);
  return -std::expm1(logps[majority]) - sum_without(probabilities, majority);
}

// Whether neither row of the head is of NaN or +inf.
bool is_sound(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
              const RowStatistics& statistics) {
  const double* p_logps = heads.p_logps + row * heads.size;
  const bool sampled = is_sampled(options.tail);
  return std::isfinite(statistics.reference) && !std::isnan(statistics.rest) &&
         std::all_of(p_logps, p_logps + heads.size, is_logp) &&
         (!sampled || is_logp(heads.p_target_logps[row]));
}

// log_q: [k] of the head, and that of the target behind them where there is one.
RowKl kl_of_row(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
                const double* log_q) {
  using Tail = Dual<double, 2>;  // by the mass of the tail and by the log-probability of y
  const int64_t k = heads.size;
  const int64_t* ids = heads.ids + row * k;
  const double* p_logps = heads.p_logps + row * k;
  HeadTerms head = head_terms(options.tail, log_q, p_logps, k);
  const bool sampled = is_sampled(options.tail);
  const bool inside = sampled && std::find(ids, ids + k, heads.targets[row]) != ids + k;
  const double log_p_y = sampled ? saturated(heads.p_target_logps[row], kFarthest) : 0;
  const double log_q_y = sampled ? drawn(log_q[k]) : 0;
  const Tail tail = tail_kl(options.tail, Tail{mass_beside(head.q, log_q), {{1, 0}}},
                            Constant<double>{mass_beside(head.p, p_logps)}, options.precision,
                            saturation_of(heads.q.dtype), Tail{log_q_y, {{0, 1}}},
                            Constant<double>{log_p_y}, inside);
  RowKl out{.kl = sum(head.kl) + tail.value,
            .head = std::move(head.slopes),
            .target = tail.grad[1],
            .q = std::move(head.q)};
  if (options.tail != TailEstimate::k1) out.kl = std::max(out.kl, 0.0);
  for (size_t i = 0; i < out.head.size(); ++i) out.head[i] -= tail.grad[0] * out.q[i];
  return out;
}

// The log-probabilities of the head of one row, and behind them that of the target if it is used.
template <class Stored>
std::vector<double> log_q_of_row(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
                                 const RowStatistics& statistics) {
  const Stored* data = row_of<Stored>(heads.q, row);
  const LogpOf logp_of(statistics, row_options(options));
  std::vector<double> out;
  out.reserve(static_cast<size_t>(heads.size) + 1);
  const auto add = [&](int64_t id) {
    const auto logit = widened<double>(data[id * heads.q.stride]);
    const double logp = logp_of(logit);
    out.push_back(logit == -infinity ? logp : std::max(logp, -kFarthest));
  };
  for (int64_t i = 0; i < heads.size; ++i) add(heads.ids[row * heads.size + i]);
  if (is_sampled(options.tail)) add(heads.targets[row]);
  return out;
}

// The gradients of a row at the columns of the head, and behind them at its target, which are not
// that of the sum alone. With the derivatives g by the log-probabilities of the ids, G their sum:
//   dq_v = (g_v - q_v G) / T,   g_v = 0 where v is none of the ids
//        = ((1 - q_v) g_v - q_v (G - g_v)) / T,   which does not cancel where q_v is near 1
// `total` becomes the G of the row, times upstream.
template <class Stored>
std::vector<Stored> gradients_of_columns(const TopKHeads& heads, const TopKKlOptions& options,
                                         int64_t row, const RowStatistics& statistics,
                                         double upstream, double& total) {
  using Real = RealOf<Stored>;
  const std::vector<double> log_q = log_q_of_row<Stored>(heads, options, row, statistics);
  RowKl kl = kl_of_row(heads, options, row, log_q.data());
  if (kl.target != 0) {
    kl.head.push_back(kl.target);
    kl.q.push_back(std::exp(log_q.back()));
  }
  const bool sound = is_sound(heads, options, row, statistics);
  const double sum_of_slopes = sound ? sum(kl.head) : std::numeric_limits<double>::quiet_NaN();
  const double per_temperature = 1 / options.temperature;
  // What is exactly 0 stays so, whatever the upstream gradient.
  const auto times_upstream = [=](double slope) { return slope == 0 ? 0 : slope * upstream; };
  const auto gradient = [&](double slope) {
    const double each = times_upstream(slope) * per_temperature;
    return narrowed<Stored>(flushed(static_cast<Real>(each)));
  };
  total = times_upstream(sum_of_slopes);
  std::vector<Stored> out(kl.head.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = gradient(kl.head[i] - kl.q[i] * sum_of_slopes);
  const size_t majority = place_of_majority(kl.q);
  if (sound && majority < out.size()) {
    const double others = sum_without(kl.head, majority), q = kl.q[majority];
    out[majority] = gradient(-std::expm1(log_q[majority]) * kl.head[majority] - q * others);
  }
  return out;
}

}  // namespace

void top_k_kl(const TopKHeads& heads, const TopKKlOptions& options, RowStatistics* statistics,
              double* kl, const Executor& executor) {
  check_heads("top_k_kl", heads, options, executor);
  with_stored_type("top_k_kl", "q", heads.q.dtype, [&]<class Stored>(Stored) {
    // Row by row: what a pass leaves in the caches is there for the head.
    for_each_row(heads.q, executor, [&](int64_t row) {
      const int64_t* target = heads.targets == nullptr ? nullptr : heads.targets + row;
      row_statistics(lone_row(heads.q, row), target, row_options(options), statistics + row);
      kl[row] = 0;
      if (is_ignored(heads, options, row)) return;
      const auto log_q = log_q_of_row<Stored>(heads, options, row, statistics[row]);
      kl[row] = is_sound(heads, options, row, statistics[row])
                    ? kl_of_row(heads, options, row, log_q.data()).kl
                    : std::numeric_limits<double>::quiet_NaN();
    });
  });
}

void top_k_kl_gradients(const TopKHeads& heads, const TopKKlOptions& options,
                        const RowStatistics* statistics, const double* upstream,
                        const MutableLogits& dq, const Executor& executor) {
  check_heads("top_k_kl_gradients", heads, options, executor);
  with_stored_type("top_k_kl_gradients", "q", heads.q.dtype, [&]<class Stored>(Stored) {
    for_each_row(heads.q, executor, [&](int64_t row) {
      double total = 0;
      std::vector<Stored> columns;  // before the logits are overwritten, where dq is q
      if (!is_ignored(heads, options, row) && upstream[row] != 0) {
        columns = gradients_of_columns<Stored>(heads, options, row, statistics[row], upstream[row],
                                               total);
      }
      row_gradients(lone_row(heads.q, row), nullptr, row_options(options), statistics + row, &total,
                    nullptr, lone_row(dq, row));
      const int64_t *ids = heads.ids + row * heads.size,
                    size = static_cast<int64_t>(columns.size());
      Stored* data = row_of<Stored>(dq, row);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t id = i < heads.size ? ids[i] : heads.targets[row];
        data[id * dq.stride] = columns[static_cast<size_t>(i)];
      }
    });
  });
}

}  // namespace tether
