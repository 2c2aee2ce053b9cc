#include "estimators/top_k_kl.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/row_lanes.h"
#include "core/stored_rows.h"

namespace tether {
namespace {

using namespace rows;

RowOptions row_options(const TopKKlOptions& options) {
  return {.temperature = options.temperature,
          .ignore_index = options.ignore_index,
          .sums = RowSums::logp};
}

// The first place of `ids` whose id stands there a second time, or `size`.
int64_t first_repeated(const int64_t* ids, int64_t size) {
  std::vector<int64_t> sorted(ids, ids + size);
  std::sort(sorted.begin(), sorted.end());
  const auto pair = std::adjacent_find(sorted.begin(), sorted.end());
  if (pair == sorted.end()) return size;
  return std::find(std::find(ids, ids + size, *pair) + 1, ids + size, *pair) - ids;
}

bool is_ignored(const TopKHeads& heads, const TopKKlOptions& options, int64_t row) {
  return heads.targets != nullptr && heads.targets[row] == options.ignore_index;
}

void check_heads(const std::string& function, const TopKHeads& heads,
                 const TopKKlOptions& options) {
  check_fields(function, options);
  const int64_t vocabulary = heads.q.vocabulary, k = heads.size;
  require(vocabulary >= 1, [&] {
    return function + ": q must have a vocabulary of at least 1, got " + text(vocabulary);
  });
  const bool given = heads.targets != nullptr;
  const bool sampled = given && heads.p_target_logps != nullptr;
  require(options.tail == TailEstimate::bucket || sampled || heads.q.rows == 0, [&] {
    return function + ": targets and p_target_logps must be given for tail k1 and k3, got none";
  });
  for (int64_t row = 0; row < heads.q.rows; ++row) {
    if (is_ignored(heads, options, row)) continue;
    const int64_t* ids = heads.ids + row * k;
    const int64_t bad = first_bad_target(ids, k, vocabulary, 0);
    require(bad == k, [&] {
      return function + ": head_ids must be in [0, " + text(vocabulary) + "), got " +
             text(ids[bad]) + " at [" + text(row) + ", " + text(bad) + "]";
    });
    const int64_t repeated = first_repeated(ids, k);
    require(repeated == k, [&] {
      return function + ": head_ids must be all different in a row, got " + text(ids[repeated]) +
             " again at [" + text(row) + ", " + text(repeated) + "]";
    });
    require(!given || (0 <= heads.targets[row] && heads.targets[row] < vocabulary), [&] {
      return function + ": targets must be in [0, " + text(vocabulary) + ") or ignore_index " +
             text(options.ignore_index) + ", got " + text(heads.targets[row]) + " at [" +
             text(row) + "]";
    });
  }
}

// A divergence, and its derivatives by the log-probabilities that it is made of.
struct RowKl {
  double kl = 0;
  std::vector<double> head;  // [k]
  double target = 0;
};

// That of the type of the results.
double saturation_of(DType dtype) {
  return dtype == DType::float64 ? kSaturation<double> : double{kSaturation<float>};
}

// log_q: [k] of the head, and that of the target behind them where there is one.
RowKl kl_of_row(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
                const double* log_q) {
  using D = Dual<double>;
  using Tail = Dual<double, 2>;  // by the mass of the tail and by the log-probability of y
  const int64_t k = heads.size;
  const int64_t* ids = heads.ids + row * k;
  const double* log_p = heads.p_logps + row * k;
  RowKl out{.head = std::vector<double>(static_cast<size_t>(k))};
  double mass_q = 1, mass_p = 1;
  for (int64_t i = 0; i < k; ++i) {
    const D term = head_kl(D{log_q[i], 1}, Constant<double>{log_p[i]});
    out.kl += term.value;
    out.head[static_cast<size_t>(i)] = term.grad;
    mass_q -= std::exp(log_q[i]);
    mass_p -= std::exp(log_p[i]);
  }
  const bool sampled = options.tail != TailEstimate::bucket;
  const bool inside = sampled && std::find(ids, ids + k, heads.targets[row]) != ids + k;
  const Tail tail =
      tail_kl(options.tail, Tail{mass_q, {{1, 0}}}, Constant<double>{mass_p}, options.precision,
              saturation_of(heads.q.dtype), Tail{sampled ? log_q[k] : 0, {{0, 1}}},
              Constant<double>{sampled ? heads.p_target_logps[row] : 0}, inside);
  out.kl += tail.value;
  if (options.tail != TailEstimate::k1) out.kl = std::max(out.kl, 0.0);
  for (int64_t i = 0; i < k; ++i) {
    out.head[static_cast<size_t>(i)] -= tail.grad[0] * std::exp(log_q[i]);
  }
  out.target = tail.grad[1];
  return out;
}

// The log-probabilities of the head of one row, and behind them that of the target if it is used.
template <class Stored>
std::vector<double> log_q_of_row(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
                                 const RowStatistics& statistics) {
  const Stored* data = row_of<Stored>(heads.q, row);
  RowStatistics of = statistics;
  std::vector<double> out;
  const auto add = [&](int64_t id) {
    of.target_logit = widened<double>(data[id * heads.q.stride]);
    out.push_back(logp(of, row_options(options)));
  };
  for (int64_t i = 0; i < heads.size; ++i) add(heads.ids[row * heads.size + i]);
  if (options.tail != TailEstimate::bucket) add(heads.targets[row]);
  return out;
}

// The columns of a row whose gradient is not that of the sum alone.
template <class Stored>
struct Columns {
  std::vector<int64_t> ids;
  std::vector<Stored> gradients;
};

// With the derivatives g by the log-probabilities of the ids, G their sum:
//   dq_v = (g_v - q_v G) / T,   g_v = 0 where v is none of the ids
// `sum` becomes the G of the row.
template <class Stored>
Columns<Stored> columns_of_row(const TopKHeads& heads, const TopKKlOptions& options, int64_t row,
                               const RowStatistics& statistics, double upstream, double& sum) {
  const std::vector<double> log_q = log_q_of_row<Stored>(heads, options, row, statistics);
  RowKl kl = kl_of_row(heads, options, row, log_q.data());
  const int64_t* ids = heads.ids + row * heads.size;
  Columns<Stored> out{.ids = {ids, ids + heads.size}, .gradients = {}};
  if (kl.target != 0) {
    out.ids.push_back(heads.targets[row]);
    kl.head.push_back(kl.target);
  }
  sum = upstream * std::accumulate(kl.head.begin(), kl.head.end(), 0.0);
  for (size_t i = 0; i < kl.head.size(); ++i) {
    const double gradient = upstream * kl.head[i] - std::exp(log_q[i]) * sum;
    out.gradients.push_back(
        narrowed<Stored>(static_cast<RealOf<Stored>>(gradient / options.temperature)));
  }
  return out;
}

}  // namespace

void top_k_kl(const TopKHeads& heads, const TopKKlOptions& options, RowStatistics* statistics,
              double* kl, const Executor& executor) {
  check_heads("top_k_kl", heads, options);
  with_stored_type("top_k_kl", "q", heads.q.dtype, [&]<class Stored>(Stored) {
    row_statistics(heads.q, heads.targets, row_options(options), statistics, executor);
    for_each_row(heads.q, executor, [&](int64_t row) {
      kl[row] = 0;
      if (is_ignored(heads, options, row)) return;
      const auto log_q = log_q_of_row<Stored>(heads, options, row, statistics[row]);
      kl[row] = kl_of_row(heads, options, row, log_q.data()).kl;
    });
  });
}

void top_k_kl_gradients(const TopKHeads& heads, const TopKKlOptions& options,
                        const RowStatistics* statistics, const double* upstream,
                        const MutableLogits& dq, const Executor& executor) {
  check_heads("top_k_kl_gradients", heads, options);
  const auto count = static_cast<size_t>(heads.q.rows);
  std::vector<double> sums(count);
  with_stored_type("top_k_kl_gradients", "q", heads.q.dtype, [&]<class Stored>(Stored) {
    // Before the logits are overwritten, where dq is q.
    std::vector<Columns<Stored>> columns(count);
    for_each_row(heads.q, executor, [&](int64_t row) {
      if (is_ignored(heads, options, row) || upstream[row] == 0) return;
      const auto i = static_cast<size_t>(row);
      columns[i] =
          columns_of_row<Stored>(heads, options, row, statistics[row], upstream[row], sums[i]);
    });
    row_gradients(heads.q, nullptr, row_options(options), statistics, sums.data(), nullptr, dq,
                  executor);
    for (int64_t row = 0; row < heads.q.rows; ++row) {
      const Columns<Stored>& in = columns[static_cast<size_t>(row)];
      Stored* data = row_of<Stored>(dq, row);
      for (size_t i = 0; i < in.ids.size(); ++i) data[in.ids[i] * dq.stride] = in.gradients[i];
    }
  });
}

}  // namespace tether
