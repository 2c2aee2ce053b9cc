#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../../core/batch.h"
#include "../../core/bit_cast.h"
#include "../../core/number.h"
#include "../../core/select.h"
#include "../../core/sum.h"
#include "../surrogate.h"
#include "bounds.h"
#include "metric_sums.h"

// The loops over a block of tokens.
//
// A loop that adds up has its lanes outside: GCC runs them side by side and keeps every sum in a
// register. It does so if the loop inside runs at least once (do) and has no branches; choices are
// made by masks because GCC turns some selections into branches.

namespace tether {

// The columns of a block of `size` tokens, a multiple of kLanes. Slots of weight 0 hold zeros.
template <class T>
struct TokenBlock {
  alignas(64) T weight[kBlock];
  alignas(64) T logp[kBlock];
  alignas(64) T level_logp[kBlock];  // of the ratio's level, where that is not the token
  alignas(64) T old_logp[kBlock];
  alignas(64) T ref_logp[kBlock];
  alignas(64) T advantage[kBlock];
  alignas(64) T log_ratio[kBlock];
  alignas(64) T ratio[kBlock];
  alignas(64) T ratio_k3[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T dloss[kBlock];
  alignas(64) T kl[kBlock];
  alignas(64) T dkl[kBlock];
  alignas(64) T kl_of_gradient[kBlock];  // where a shared ratio weighs the penalty
  // Where a ratio is a segment's (rl/kernels/segments.h):
  alignas(64) T share[kBlock];         // 1 / n
  alignas(64) T ratio_weight[kBlock];  // w / n: of a token in the metrics of the ratio
  alignas(64) T kl_weight[kBlock];     // of its penalty
  alignas(64) T slope[kBlock];         // what it adds to that of the segment
  alignas(64) T inside[kBlock];        // 1 where the clip of log-ratios lets it count, else 0
  alignas(64) T dlogp[kBlock];
  alignas(64) T entropy[kBlock];
  alignas(64) T dentropy[kBlock];
  alignas(64) T rollout_logp[kBlock];
  alignas(64) T token_weight[kBlock];  // W
  alignas(64) T given_weight[kBlock];  // of the caller's
  alignas(64) T given_kl_weight[kBlock];
  alignas(64) T given_entropy_weight[kBlock];
  alignas(64) T statistic[kBlock];  // of one weight
  const T* anchor_logp = ref_logp;  // of the policy that the penalty ties to
  int size;

  TokenBlock() = default;
  TokenBlock(const TokenBlock&) = delete;  // anchor_logp is one of its columns
};

// Arrays of the type of the arithmetic, in one piece: the common batch.
template <class T>
struct PlainTokens {
  const T *logps, *old_logps, *advantages;
};

// Selects by block.weight.
template <class T>
TETHER_CLONES void load_plain(const PlainTokens<T>& in, int count, TokenBlock<T>& block) {
  const T *logps = in.logps, *old_logps = in.old_logps, *advantages = in.advantages;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {  // VECTOR
    const T logp = logps[i], old_logp = old_logps[i], advantage = advantages[i];
    const bool active = block.weight[i] != T(0);
    block.logp[i] = active ? logp : T(0);
    block.old_logp[i] = active ? old_logp : T(0);
    block.advantage[i] = active ? advantage : T(0);
  }
  for (int i = count; i < block.size; ++i) {
    block.logp[i] = block.old_logp[i] = block.advantage[i] = T(0);
  }
}

template <class T>
TETHER_CLONES void saturate_column(T largest, int count, T* column) {
  const int size = count / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) column[i] = saturated(column[i], largest);  // VECTOR
}

// Inputs as the few batches need them in which something overflowed. Of arrays that were not given
// the columns are not looked at.
template <class Batch, class T>
void saturate(const Batch& batch, TokenBlock<T>& block) {
  saturate_column(Largest<T>::kInput, block.size, block.logp);
  saturate_column(Largest<T>::kInput, block.size, block.old_logp);
  saturate_column(Largest<T>::kInput, block.size, block.advantage);
  if (batch.ref_logps) saturate_column(Largest<T>::kInput, block.size, block.ref_logp);
  if (batch.rollout_logps) saturate_column(Largest<T>::kInput, block.size, block.rollout_logp);
}

template <class T>
TETHER_CLONES void bound_advantages(TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    block.advantage[i] = beside_ratio(block.advantage[i], block.ratio[i]);
  }
}

// `saturation` is an argument because GCC makes cases of a constant.
template <class T>
TETHER_CLONES void fill_ratios(T saturation, TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T log_ratio = block.logp[i] - block.old_logp[i];
    const auto ratio = math::exp_and_expm1_minus(log_ratio, -saturation, saturation);
    block.log_ratio[i] = log_ratio;
    block.ratio[i] = ratio.exp;
    block.ratio_k3[i] = ratio.expm1_minus;
  }
}

// Adds a block of weights; NaN if check_weights refuses one.
template <class T>
TETHER_CLONES void sum_weights(const T* weight, int size, LaneSum& tokens) {
  double sums[kLanes];
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    int start = 0;
    do {
      const T w = weight[start + lane];
      const Mask<T> legal =
          mask<T>(w == T(0)) | (mask<T>(w >= T(kSmallestWeight)) & mask<T>(w <= T(1)));
      sum += double(bit_cast<T>(bit_cast<Mask<T>>(w) | ~legal));
      start += kLanes;
    } while (start < size);
    sums[lane] = sum;
  }
  tokens.add(sums);
}

// The value, or NaN.
template <class T>
TETHER_INLINE T spoil(Mask<T> where, T value) {
  return bit_cast<T>(where | bit_cast<Mask<T>>(value));
}

template <class T>
TETHER_INLINE T either(Mask<T> where, T value, T otherwise) {
  return bit_cast<T>(bit_cast<Mask<T>>(keep(where, value)) |
                     bit_cast<Mask<T>>(keep(~where, otherwise)));
}

// What the tokens of a row share in the sums.
template <class T>
struct TokenFactors {
  T loss, kl;  // of S and K in the loss
};

// The orders of the highest and of the lowest number.
template <class T>
inline constexpr Order<T> kLastOrder = order_of(std::numeric_limits<T>::infinity());
template <class T>
inline constexpr Order<T> kFirstOrder = ~kLastOrder<T>;

// The sums of one lane: loss and penalty in double throughout, the others in T within the block.
template <class T>
struct TokenLane {
  double loss = 0, kl = 0;
  T low = 0, high = 0, dual = 0, k1 = 0, k3 = 0, ratios = 0, squares = 0, nonfinite = 0;
  Order<T> most, least;
};

// What overflows counts as the largest number.
template <bool kBounded, class T>
TETHER_INLINE T bounded_if(T value) {
  return kBounded ? bounded(value) : value;
}

// The loss and the penalty of token i, and its gradient. A broken token, which has a NaN or
// infinity somewhere, spoils the loss and its own gradient: saturation would hide it. Returns which
// are.
template <bool kPenalty, bool kWeighted, bool kBounded, class T>
TETHER_INLINE Mask<T> add_loss(T loss_factor, T kl_factor, int i, TokenBlock<T>& block,
                               TokenLane<T>& lane) {
  const T w = block.weight[i];
  if constexpr (kBounded) {
    block.loss[i] = bounded(block.loss[i]);
    block.dloss[i] = bounded(block.dloss[i]);
  }
  T loss = block.loss[i], slope = block.dloss[i], trace = T(0);
  if constexpr (kWeighted) {
    const T W = block.token_weight[i];
    loss = bounded_if<kBounded>(W * loss);
    slope = bounded_if<kBounded>(W * slope);
    trace = W * T(0);
  }
  T gradient = loss_factor * slope, early = bounded_if<kBounded>(w * loss_factor * slope);
  const Mask<T> active = mask<T>(w != T(0));
  if constexpr (kPenalty) {
    if constexpr (kBounded) {
      block.kl[i] = bounded(block.kl[i]);
      block.dkl[i] = bounded(block.dkl[i]);
    }
    const T kl = block.kl[i];
    gradient += kl_factor * block.dkl[i];
    early += bounded_if<kBounded>(w * kl_factor * block.dkl[i]);
    trace += kl * T(0) + block.anchor_logp[i] * T(0);
    lane.kl += double(keep(active, w * kl));
  }
  const T seen = kBounded ? bounded(early) : gradient;
  T weighted = w * gradient;
  if constexpr (kBounded) {
    // Where the product overflows w comes first, which may bring it back. Elsewhere the bits are
    // those of a block in which nothing does.
    weighted = either(mask<T>(gradient - gradient != T(0)), seen, weighted);
  }
  trace += zero_or_nan(block.log_ratio[i], block.advantage[i], loss, seen);
  const Mask<T> broken = active & mask<T>(trace != T(0));
  lane.loss += double(spoil(broken, keep(active, w * loss)));
  block.dlogp[i] = spoil(broken, keep(active, weighted));
  lane.nonfinite += keep(broken, T(1));
  return broken;
}

// The metrics of the ratio of token i, which has `weight` in them.
template <class T>
TETHER_INLINE void add_ratio(T weight, Mask<T> broken, int i, const TokenBlock<T>& block,
                             TokenLane<T>& lane) {
  using Order = Order<T>;
  const T A = block.advantage[i], d = block.log_ratio[i];
  const T stuck = keep(mask<T>(block.dloss[i] == T(0)), weight);
  const T bad = keep(mask<T>(A < T(0)), stuck), good = keep(mask<T>(A > T(0)), stuck);
  lane.low += keep(mask<T>(d < T(0)), bad + good);
  lane.high += keep(mask<T>(d > T(0)), good);
  lane.dual += keep(mask<T>(d > T(0)), bad);

  const T ratio = bounded(block.ratio[i], kLargestRatio<T>), weighted_ratio = weight * ratio;
  lane.ratios += weighted_ratio;
  lane.squares += weighted_ratio * ratio;
  lane.k1 -= weight * d;
  lane.k3 += weight * block.ratio_k3[i];
  const Mask<T> active = mask<T>(block.weight[i] != T(0));
  const Order seen = Order(active & ~broken), order = order_of(d) & seen;
  const Order above = order | (kFirstOrder<T> & ~seen), below = order | (kLastOrder<T> & ~seen);
  lane.most = above > lane.most ? above : lane.most;
  lane.least = below < lane.least ? below : lane.least;
}

// Adds a block to the sums and makes its gradient. `ratio_weight`: of the tokens in the metrics of
// the ratio. kWeighted: by W. kBounded: in `loss`, `dloss`, `kl` and `dkl` too.
template <bool kPenalty, bool kWeighted, bool kBounded, class T>
TETHER_CLONES void sum_block(const TokenFactors<T>& factors, const T* ratio_weight,
                             TokenBlock<T>& block, MetricSums& metrics) {
  const T loss_factor = factors.loss, kl_factor = factors.kl;
  using M = PolicyMetrics;
  double losses[kLanes], kls[kLanes];
  T sums[M::kNonfinite + 1][kLanes], highest[kLanes], lowest[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    TokenLane<T> of{.most = kFirstOrder<T>, .least = kLastOrder<T>};
    int start = 0;
    do {
      const int i = start + lane;
      const Mask<T> broken =
          add_loss<kPenalty, kWeighted, kBounded>(loss_factor, kl_factor, i, block, of);
      add_ratio(ratio_weight[i], broken, i, block, of);
      start += kLanes;
    } while (start < block.size);
    losses[lane] = of.loss;
    kls[lane] = of.kl;
    sums[M::kClipFractionLow][lane] = of.low;
    sums[M::kClipFractionHigh][lane] = of.high;
    sums[M::kClipFractionDual][lane] = of.dual;
    sums[M::kApproxKlK1][lane] = of.k1;
    sums[M::kApproxKlK3][lane] = of.k3;
    sums[M::kRatio][lane] = of.ratios;
    sums[M::kRatioSquared][lane] = of.squares;
    sums[M::kNonfinite][lane] = of.nonfinite;
    highest[lane] = in_order<T>(of.most);
    lowest[lane] = -in_order<T>(of.least);
  }
  metrics.sums[M::kPolicyLoss].add(losses);
  metrics.sums[M::kKl].add(kls);
  for (int i = M::kClipFractionLow; i <= M::kNonfinite; ++i) metrics.sums[i].add(sums[i]);
  metrics.maxima[M::kLogRatioMax].add(highest);
  metrics.maxima[M::kNegLogRatioMax].add(lowest);
}

// Whether a ratio of the block is outside of the interval.
template <class T>
TETHER_CLONES bool any_truncated(const RatioInterval& inside, const TokenBlock<T>& block) {
  const T lowest = T(inside.low), highest = T(inside.high);
  const int size = block.size / kLanes * kLanes;
  Mask<T> outside = 0;
  for (int i = 0; i < size; ++i) {  // VECTOR
    outside |= mask<T>(block.ratio[i] < lowest) | mask<T>(block.ratio[i] > highest);
  }
  return outside != 0;
}

// Adds the tokens whose weight is truncated outside of an interval of ratios, although they keep a
// gradient, to those that are clipped.
template <class T>
TETHER_CLONES void sum_truncated(const RatioInterval& inside, const T* ratio_weight,
                                 const TokenBlock<T>& block, MetricSums& metrics) {
  using M = PolicyMetrics;
  const T lowest = T(inside.low), highest = T(inside.high);
  T lows[kLanes], highs[kLanes], duals[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    T low = 0, high = 0, dual = 0;
    int start = 0;
    do {
      const int i = start + lane;
      const T A = block.advantage[i], ratio = block.ratio[i];
      const T w = keep(mask<T>(block.dloss[i] != T(0)), ratio_weight[i]);
      const T above = keep(mask<T>(ratio > highest), w);
      low += keep(mask<T>(ratio < lowest), w);
      high += keep(mask<T>(A > T(0)), above);
      dual += keep(mask<T>(A < T(0)), above);
      start += kLanes;
    } while (start < block.size);
    lows[lane] = low;
    highs[lane] = high;
    duals[lane] = dual;
  }
  metrics.sums[M::kClipFractionLow].add(lows);
  metrics.sums[M::kClipFractionHigh].add(highs);
  metrics.sums[M::kClipFractionDual].add(duals);
}

// Adds the entropies of a block and makes their gradient.
template <class T>
TETHER_CLONES void sum_entropies(T factor, TokenBlock<T>& block, MetricSums& metrics) {
  double sums[kLanes];
  T broken[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    T count = 0;
    int start = 0;
    do {
      const int i = start + lane;
      const T w = block.weight[i] * block.given_entropy_weight[i];
      const T entropy = w * block.entropy[i];
      sum += double(entropy) + double(entropy) * 0;  // infinity is NaN
      block.dentropy[i] = bounded(-factor * w);
      count += keep(mask<T>(entropy - entropy != T(0)), T(1));
      start += kLanes;
    } while (start < block.size);
    sums[lane] = sum;
    broken[lane] = count;
  }
  metrics.sums[PolicyMetrics::kEntropy].add(sums);
  metrics.sums[PolicyMetrics::kNonfinite].add(broken);
}

}  // namespace tether
