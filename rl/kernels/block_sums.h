#pragma once

#include <limits>

#include "core/batch.h"
#include "core/sum.h"
#include "estimators/kl.h"
#include "rl/policy_metrics.h"

// Sums over one block of tokens, in kLanes lanes.

namespace tether {

// Adds a block to kLanes running sums; within the block the lanes are of type Sum.
template <class Sum, class T>
TETHER_CLONES void add_lanes(const T* in, int size, double* lanes) {
  Sum sum[kLanes] = {};
  for (int i = 0; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += Sum(in[i + lane]);  // VECTOR
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += double(sum[lane]);
}

// The largest so far, lane by lane.
template <class T>
TETHER_CLONES void max_lanes(const T* in, int size, double* lanes) {
  T largest[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) largest[lane] = T(lanes[lane]);
  for (int i = 0; i + kLanes <= size; i += kLanes) {
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
      const T candidate = in[i + lane];
      largest[lane] = candidate > largest[lane] ? candidate : largest[lane];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = double(largest[lane]);
}

// The weights, NaN where one is outside [0, 1]: their sum then tells.
template <class T>
TETHER_CLONES void check_weights(int size, T* weight) {
  size = size / kLanes * kLanes;
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = weight[i];
    const T bounded_below = w >= T(0) ? w : std::numeric_limits<T>::quiet_NaN();
    weight[i] = bounded_below <= T(1) ? bounded_below : std::numeric_limits<T>::quiet_NaN();
  }
}

// What the metrics are made from, for one block of tokens.
template <class T>
struct MetricInputs {
  const T* weight;
  const T* logp;
  const T* old_logp;
  const T* ref_logp;
  const T* advantage;
  const T* log_ratio;
  const T* loss;
  const T* dloss;
  const T* kl;
};

// One column per metric, each token's share of its sum.
template <class T>
struct MetricColumns {
  alignas(64) T of[PolicyMetrics::kSums][kBlock];
  alignas(64) T maximum_of[PolicyMetrics::kMaxima][kBlock];
};

template <class T>
TETHER_CLONES void fill_metrics(const MetricInputs<T>& in, int size, MetricColumns<T>& out) {
  using M = PolicyMetrics;
  const T *weight = in.weight, *logp = in.logp, *old_logp = in.old_logp, *ref_logp = in.ref_logp,
          *advantage = in.advantage, *log_ratio = in.log_ratio, *loss = in.loss, *dloss = in.dloss,
          *kl = in.kl;
  T *losses = out.of[M::kPolicyLoss], *kls = out.of[M::kKl], *low = out.of[M::kClipFractionLow],
    *high = out.of[M::kClipFractionHigh], *dual = out.of[M::kClipFractionDual],
    *k1s = out.of[M::kApproxKlK1], *k3s = out.of[M::kApproxKlK3], *ratios = out.of[M::kRatio],
    *squares = out.of[M::kRatioSquared], *nonfinite = out.of[M::kNonfinite],
    *up = out.maximum_of[M::kLogRatioMax], *down = out.maximum_of[M::kNegLogRatioMax];
  size = size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = weight[i], d = log_ratio[i];
    const T k3_value = k3(Constant<T>{d}).value;
    const T raised = d < -kSaturation<T> ? -kSaturation<T> : d;
    const T ratio = k3_value + (raised > kSaturation<T> ? kSaturation<T> : raised) + T(1);
    k1s[i] = -w * d;
    k3s[i] = w * k3_value;
    ratios[i] = w * ratio;
    squares[i] = w * ratio * ratio;
    up[i] = w != T(0) ? d : T(-M::kUnseen);
    down[i] = w != T(0) ? -d : T(-M::kUnseen);
  }
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = weight[i], A = advantage[i], d = log_ratio[i];
    const T stuck = dloss[i] == T(0) ? w : T(0);
    const T bad = A < T(0) ? stuck : T(0), good = A > T(0) ? stuck : T(0);
    low[i] = d < T(0) ? bad : T(0);
    high[i] = d > T(0) ? good : T(0);
    dual[i] = d > T(0) ? bad : T(0);
    // 0 times a number is 0 unless that number is NaN or infinite.
    const T trace = (logp[i] * T(0) + old_logp[i] * T(0)) + (ref_logp[i] * T(0) + A * T(0)) +
                    (loss[i] * T(0) + dloss[i] * T(0)) + kl[i] * T(0);
    const T active = w != T(0) ? T(1) : T(0);
    nonfinite[i] = trace == T(0) ? T(0) : active;
    const T weighted_loss = w * loss[i], weighted_kl = w * kl[i];
    losses[i] = w != T(0) ? weighted_loss : T(0);
    kls[i] = w != T(0) ? weighted_kl : T(0);
  }
}

// The running sums behind PolicyMetrics, over blocks and rows. Loss and penalty are in double
// throughout and belong to one row (take_row); the others are in T within a block.
class MetricSums {
 public:
  MetricSums() {
    for (auto& row : maxima_) {
      for (double& each : row) each = -PolicyMetrics::kUnseen;
    }
  }

  template <class T>
  void add(const MetricInputs<T>& in, int size) {
    MetricColumns<T> columns;
    fill_metrics(in, size, columns);
    using M = PolicyMetrics;
    add_lanes<double>(columns.of[M::kPolicyLoss], size, row_loss_.lane);
    add_lanes<double>(columns.of[M::kKl], size, row_kl_.lane);
    for (int i = M::kClipFractionLow; i < M::kSums; ++i) {
      add_lanes<T>(columns.of[i], size, sums_[i].lane);
    }
    add_lanes<T>(in.weight, size, weights_.lane);
    for (int i = 0; i < M::kMaxima; ++i) max_lanes(columns.maximum_of[i], size, maxima_[i]);
  }

  // The sums of the surrogate and the penalty since the last call.
  struct Row {
    double loss, kl;
  };
  Row take_row() {
    const Row row{row_loss_.total(), row_kl_.total()};
    loss_ += row.loss;
    kl_ += row.kl;
    row_loss_ = {};
    row_kl_ = {};
    return row;
  }

  PolicyMetrics metrics() const {
    PolicyMetrics out;
    const double count = weights_.total();
    for (size_t i = 0; i < PolicyMetrics::kSums; ++i) {
      out.sums[2 * i] = sums_[i].total();
      out.sums[2 * i + 1] = count;
    }
    out.sums[2 * PolicyMetrics::kPolicyLoss] = loss_;
    out.sums[2 * PolicyMetrics::kKl] = kl_;
    for (size_t i = 0; i < PolicyMetrics::kMaxima; ++i) {
      for (double each : maxima_[i]) out.maxima[i] = each > out.maxima[i] ? each : out.maxima[i];
    }
    return out;
  }

 private:
  double loss_ = 0, kl_ = 0;
  LaneSum row_loss_, row_kl_, weights_;
  LaneSum sums_[PolicyMetrics::kSums];
  double maxima_[PolicyMetrics::kMaxima][kLanes];
};

}  // namespace tether
