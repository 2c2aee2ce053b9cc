#pragma once

#include "../../core/macros.h"
#include "../../core/math.h"
#include "../../core/sum.h"
#include "../level.h"
#include "token_block.h"

// The loops over a block of tokens whose ratio belongs to their row (rl/level.h).

namespace tether {

// Adds w logp and w (logp - old_logp) of a block.
template <class T>
TETHER_CLONES void sum_level(const TokenBlock<T>& block, LaneSum& logps, LaneSum& log_ratios) {
  double logp_sums[kLanes], log_ratio_sums[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double logp_sum = 0, log_ratio_sum = 0;
    int start = 0;
    do {
      const int i = start + lane;
      const double w = double(block.weight[i]);
      double logp = double(block.logp[i]), old_logp = double(block.old_logp[i]);
      if constexpr (sizeof(T) == sizeof(double)) {  // floats do not overflow here
        logp = saturated(logp, Largest<double>::kLogp);
        old_logp = saturated(old_logp, Largest<double>::kLogp);
      }
      logp_sum += w * logp;
      log_ratio_sum += w * (logp - old_logp);
      start += kLanes;
    } while (start < block.size);
    logp_sums[lane] = logp_sum;
    log_ratio_sums[lane] = log_ratio_sum;
  }
  logps.add(logp_sums);
  log_ratios.add(log_ratio_sums);
}

// What the tokens of a row share.
template <class T>
struct RowRatio {
  T logp, log_ratio, ratio, ratio_k3;

  static RowRatio of(double logp, double log_ratio) {
    const T bound = kSaturation<T>, narrowed = narrow(log_ratio, Largest<T>::kLogp);
    const auto both = math::exp_and_expm1_minus(narrowed, -bound, bound);
    return {narrow<T>(logp), narrowed, both.exp, both.expm1_minus};
  }
};

template <class T>
TETHER_CLONES void fill_ratios(const RowRatio<T>& row, TokenBlock<T>& block) {
  const T logp = row.logp, log_ratio = row.log_ratio, ratio = row.ratio, ratio_k3 = row.ratio_k3;
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    block.level_logp[i] = logp;
    block.log_ratio[i] = log_ratio;
    block.ratio[i] = ratio;
    block.ratio_k3[i] = ratio_k3;
  }
}

// Adds w W dS/dL of a block; a broken token spoils the sum, as in sum_block.
template <bool kPenalty, bool kWeighted, bool kBounded, class T>
TETHER_CLONES void sum_slopes(const TokenBlock<T>& block, LaneSum& slopes) {
  double sums[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    int start = 0;
    do {
      const int i = start + lane;
      const T w = block.weight[i];
      T loss = block.loss[i], dloss = block.dloss[i];
      if constexpr (kWeighted) {
        const T W = block.token_weight[i];
        loss = kBounded ? bounded(W * loss) : W * loss;
        dloss = kBounded ? bounded(W * dloss) : W * dloss;
      }
      const Mask<T> active = mask<T>(w != T(0));
      T trace = zero_or_nan(block.log_ratio[i], block.advantage[i], loss, dloss);
      if constexpr (kPenalty) trace += zero_or_nan(block.ref_logp[i], block.kl[i], T(0), T(0));
      const Mask<T> broken = active & mask<T>(trace != T(0));
      sum += double(spoil(broken, keep(active, w * dloss)));
      start += kLanes;
    } while (start < block.size);
    sums[lane] = sum;
  }
  slopes.add(sums);
}

// The gradient where all tokens of the row share `slope`, d loss / dL dL / d logp over w, beside a
// penalty of their own.
template <bool kPenalty, class T>
TETHER_CLONES void fill_shared_gradient(T slope, T kl_factor, TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = block.weight[i];
    const Mask<T> active = mask<T>(w != T(0));
    T gradient = slope;
    Mask<T> broken = 0;
    if constexpr (kPenalty) {
      const T dkl = bounded(block.dkl[i]);
      gradient = bounded(slope + bounded(kl_factor * dkl));
      broken = active & mask<T>(zero_or_nan(block.ref_logp[i], dkl, T(0), T(0)) != T(0));
    }
    block.dlogp[i] = spoil(broken, keep(active, w * gradient));
  }
}

}  // namespace tether
