#pragma once

#include <utility>

#include "../../core/macros.h"
#include "../../core/sum.h"
#include "../level.h"
#include "segments.h"
#include "token_block.h"

// The loops over a block of tokens whose ratio belongs to a segment of their row (rl/level.h).

namespace tether {

// A token as a level adds it up.
struct LevelTerm {
  double logp, log_ratio;  // times w
};

// Those of a block.
struct LevelColumns {
  alignas(64) double weight[kBlock];
  alignas(64) double logp[kBlock];
  alignas(64) double log_ratio[kBlock];
};
template <bool kClipped, class T>
TETHER_INLINE LevelTerm level_term(const TokenBlock<T>& block, const LogRatioClip& clip, int i) {
  const double w = double(block.weight[i]);
  double logp = double(block.logp[i]), old_logp = double(block.old_logp[i]);
  if constexpr (sizeof(T) == sizeof(double)) {  // floats do not overflow here
    logp = saturated(logp, Largest<double>::kInput);
    old_logp = saturated(old_logp, Largest<double>::kInput);
  }
  double log_ratio = logp - old_logp;
  if constexpr (kClipped) log_ratio = clipped(log_ratio, double(block.advantage[i]), clip);
  return {w * logp, w * log_ratio};
}

// Adds a block to the sums of its row.
template <bool kClipped, class T>
TETHER_CLONES void sum_level(const TokenBlock<T>& block, const LogRatioClip& clip_in,
                             LaneSum& logps, LaneSum& log_ratios) {
  const LogRatioClip clip = clip_in;
  double logp_sums[kLanes], log_ratio_sums[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double logp_sum = 0, log_ratio_sum = 0;
    int start = 0;
    do {
      const LevelTerm term = level_term<kClipped>(block, clip, start + lane);
      logp_sum += term.logp;
      log_ratio_sum += term.log_ratio;
      start += kLanes;
    } while (start < block.size);
    logp_sums[lane] = logp_sum;
    log_ratio_sums[lane] = log_ratio_sum;
  }
  logps.add(logp_sums);
  log_ratios.add(log_ratio_sums);
}

// The same of each token, to be added up by parts.
template <bool kClipped, class T>
TETHER_CLONES void fill_level_terms(const TokenBlock<T>& block, const LogRatioClip& clip_in,
                                    LevelColumns& out) {
  const LogRatioClip clip = clip_in;
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const LevelTerm term = level_term<kClipped>(block, clip, i);
    out.weight[i] = double(block.weight[i]);
    out.logp[i] = term.logp;
    out.log_ratio[i] = term.log_ratio;
  }
}

// Adds a part of them to the sums of its segment.
template <class T>
TETHER_CLONES void sum_terms(const LevelColumns& terms, int begin, int end,
                             RatioSegment<T>& segment) {
  using Column = std::pair<const double*, FourChains&>;
  FourChains n, logp, log_ratio;
  add_part(begin, end, Column(terms.weight, n), Column(terms.logp, logp),
           Column(terms.log_ratio, log_ratio));
  segment.n += n.total();
  segment.logp += logp.total();
  segment.log_ratio += log_ratio.total();
}

// A part of a block that shares a ratio.
template <class T>
TETHER_CLONES void fill_ratios(const SharedRatio<T>& shared, int begin, int end,
                               TokenBlock<T>& block) {
  const SharedRatio<T> ratio = shared;
#pragma GCC ivdep
  for (int i = begin; i < end; ++i) {  // VECTOR
    block.level_logp[i] = ratio.logp;
    block.log_ratio[i] = ratio.log_ratio;
    block.ratio[i] = ratio.ratio;
    block.ratio_k3[i] = ratio.ratio_k3;
    block.share[i] = ratio.share;
    block.kl_weight[i] = ratio.kl_weight;
  }
}

template <class T>
TETHER_CLONES void fill_ratio_weights(TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    block.ratio_weight[i] = block.weight[i] * block.share[i];
  }
}

// w W dS/dL of the tokens in a block; a broken one spoils the sum, as in sum_block.
template <bool kPenalty, bool kWeighted, bool kBounded, class T>
TETHER_CLONES void fill_slopes(TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = block.weight[i];
    T loss = block.loss[i], dloss = block.dloss[i];
    if constexpr (kWeighted) {
      const T W = block.token_weight[i];
      loss = kBounded ? bounded(W * loss) : W * loss;
      dloss = kBounded ? bounded(W * dloss) : W * dloss;
    }
    const Mask<T> active = mask<T>(w != T(0));
    T trace = zero_or_nan(block.log_ratio[i], block.advantage[i], loss, dloss);
    if constexpr (kPenalty) trace += zero_or_nan(block.anchor_logp[i], block.kl[i], T(0), T(0));
    const Mask<T> broken = active & mask<T>(trace != T(0));
    block.slope[i] = spoil(broken, keep(active, w * dloss));
  }
}

// Adds the slopes of a block to the sum of its row.
template <class T>
TETHER_CLONES void sum_slopes(const TokenBlock<T>& block, LaneSum& slopes) {
  double sums[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    int start = 0;
    do {
      sum += double(block.slope[start + lane]);
      start += kLanes;
    } while (start < block.size);
    sums[lane] = sum;
  }
  slopes.add(sums);
}

// Where the clip lets a token's own log-ratio count, 1; else 0.
template <class T>
TETHER_CLONES void fill_inside(const LogRatioClip& clip_in, TokenBlock<T>& block) {
  const LogRatioClip clip = clip_in;
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const double logp = double(block.logp[i]), old_logp = double(block.old_logp[i]);
    const double u = logp - old_logp, trace = logp * 0 + old_logp * 0;  // 0, or NaN
    const bool beyond = clipped(u, double(block.advantage[i]), clip) != u;
    block.inside[i] = beyond & (trace == 0) ? T(0) : T(1);
  }
}

// The gradient of tokens that share `slope`, d loss / dL dL / d logp over w, beside a penalty of
// their own. What overflows meets w first, which may bring it back.
template <bool kPenalty, bool kClipped, class T>
TETHER_CLONES void fill_shared_gradient(T slope, T kl_factor, int begin, int end,
                                        TokenBlock<T>& block) {
#pragma GCC ivdep
  for (int i = begin; i < end; ++i) {  // VECTOR
    const T w = block.weight[i];
    const Mask<T> active = mask<T>(w != T(0));
    T gradient = slope;
    if constexpr (kClipped) gradient = keep(mask<T>(block.inside[i] != T(0)), slope);
    T weighted = w * gradient;
    Mask<T> broken = 0;
    if constexpr (kPenalty) {
      const T dkl = bounded(block.dkl[i]);
      const T early = bounded(bounded(w * gradient) + bounded(w * kl_factor * dkl));
      const T both = gradient + kl_factor * dkl;
      weighted = bounded(either(mask<T>(both - both != T(0)), early, w * both));
      broken = active & mask<T>(zero_or_nan(block.anchor_logp[i], dkl, T(0), T(0)) != T(0));
    }
    block.dlogp[i] = spoil(broken, keep(active, weighted));
  }
}

// The same of a slope beyond T. It and the penalty are bounded each.
template <class T>
void fill_far_gradient(double slope, bool clips, bool penalty, T kl_factor, int begin, int end,
                       TokenBlock<T>& block) {
  for (int i = begin; i < end; ++i) {
    const T w = block.weight[i], dkl = penalty ? bounded(block.dkl[i]) : T(0);
    const T anchor = penalty ? block.anchor_logp[i] : T(0);
    const double inside = clips && block.inside[i] == T(0) ? 0 : slope;
    const T own = narrow<T>(double(w) * inside);
    const T gradient = bounded(own + narrow<T>(double(w) * double(kl_factor) * double(dkl)));
    block.dlogp[i] = w == T(0) ? T(0) : gradient + zero_or_nan(anchor, dkl, T(0), T(0));
  }
}

}  // namespace tether
