#pragma once

#include "../../core/number.h"
#include "../kl_penalty.h"
#include "../level.h"
#include "segments.h"
#include "token_block.h"

// The loops that fill the penalty of a block of tokens (rl/kl_penalty.h): K in `kl`, its derivative
// by logp in `dkl`. A form brings three of its own (estimators/kl/kl_form.h).

namespace tether {

// Weighs K and its derivative by the token's own ratio, policy / sampler. A sampler's number that
// is not finite makes NaN, which a bound would hide.
template <class T>
TETHER_CLONES void weigh_by_own_ratio(T lowest, T highest, const T* sampler_logp,
                                      TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T rho =
        math::exp(block.logp[i] - sampler_logp[i], lowest, highest) + sampler_logp[i] * T(0);
    block.kl[i] *= rho;
    block.dkl[i] *= rho;
  }
}

template <class T>
TETHER_CLONES void weigh(const T* rho, int count, T* column) {
  const int size = count / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) column[i] *= rho[i];  // VECTOR
}

// By the caller's weights: one that is not finite makes NaN, which a bound would hide.
template <class T>
TETHER_CLONES void weigh_by_given(const T* weight, int count, T* column) {
  const int size = count / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) column[i] = column[i] * weight[i] + weight[i] * T(0);  // VECTOR
}

// Adds w rho G of a part of a block, whose gradient goes through the ratio that the segment shares.
// A broken token spoils the sum, as in fill_slopes.
template <class T>
void sum_kl_of_gradient(const TokenBlock<T>& block, int begin, int end, CompensatedSum& total) {
  for (int i = begin; i < end; ++i) {
    const double w = double(block.weight[i]);
    if (w == 0) continue;
    const T trace = (block.anchor_logp[i] - block.logp[i]) * T(0);  // 0, or NaN
    total.add(w * double(bounded(block.kl_of_gradient[i]) + trace));
  }
}

// Adds to dkl what the segment's other tokens give a penalty whose ratio they share: the sum of
// their w rho G over `n`, and of its own what it has beyond 1. Of a token that is alone both are 0,
// whatever its weight.
template <class T>
void add_shared_penalty(double n, const CompensatedSum& total, int begin, int end,
                        TokenBlock<T>& block) {
  for (int i = begin; i < end; ++i) {
    const double w = double(block.weight[i]), own = double(bounded(block.kl_of_gradient[i]));
    const double others = (total.sum - w * own) + total.rest;
    block.dkl[i] = bounded(block.dkl[i]) + T(bounded(others / n + own * (w / n - 1)));
  }
}

// The column of a policy.
template <class T>
const T* logp_of(KlReference policy, const TokenBlock<T>& block) {
  switch (policy) {
    case KlReference::reference:
      return block.ref_logp;
    case KlReference::old:
      return block.old_logp;
    case KlReference::rollout:
      return block.rollout_logp;
  }
  return block.ref_logp;
}

// Whether a token's penalty changes with the log-probabilities of the others of its segment.
inline bool shares_penalty(const KlPenalty& penalty, RatioLevel level) {
  return penalty.correction == KlCorrection::level_ratio && shares_ratio(level);
}

// v rho K(d) with the gradient of v rho G(d); v are the caller's weights, or 1. Above the level of
// tokens a correction by the level's ratio has rho = block.kl_weight. Where the gradient goes
// through a ratio that is shared, it is not the token's alone: dkl is then its part without the
// others', and `kl_of_gradient` is rho G.
template <class T>
void fill_penalty(const KlPenalty& penalty, RatioLevel level, bool given, TokenBlock<T>& block) {
  const bool of_segment = of_level(penalty.correction) && level != RatioLevel::token;
  const KlColumns<T> in{block.logp, block.anchor_logp, block.size};
  const bool by_score = through_ratio(penalty.correction);
  by_score ? penalty.gradient.score(in, block.dkl)
           : penalty.gradient.value_and_slope(in, block.kl, block.dkl);
  if (by_score || penalty.estimator != penalty.gradient) penalty.estimator.value(in, block.kl);
  if (shares_penalty(penalty, level)) {
    penalty.gradient.value(in, block.kl_of_gradient);
    weigh(block.kl_weight, block.size, block.kl_of_gradient);
    if (given) weigh_by_given(block.given_kl_weight, block.size, block.kl_of_gradient);
  }
  if (given) {
    weigh_by_given(block.given_kl_weight, block.size, block.kl);
    weigh_by_given(block.given_kl_weight, block.size, block.dkl);
  }
  if (of_segment) {
    weigh(block.kl_weight, block.size, block.kl);
    weigh(block.kl_weight, block.size, block.dkl);
  } else if (weighs(penalty.correction)) {
    const KlWeightBounds bounds = weight_bounds(kWeightSaturation<T>, penalty.ratio_high);
    weigh_by_own_ratio(T(bounds.low), T(bounds.high),
                       logp_of(sampler_of(penalty.correction), block), block);
  }
}

}  // namespace tether
