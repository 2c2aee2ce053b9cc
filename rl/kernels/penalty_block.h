#pragma once

#include "../../core/number.h"
#include "../../core/sum.h"
#include "../kl_penalty.h"
#include "../level.h"
#include "token_block.h"

// The loops that fill the penalty of a block of tokens (rl/kl_penalty.h): K in `kl`, its derivative
// by logp in `dkl`. An estimator has three: its value, value and slope, and its score.

namespace tether {

template <KlEstimator kEstimator, class T>
TETHER_CLONES void fill_kl_value(const TokenBlock<T>& block, T* value) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    value[i] = kl_value(kEstimator, Constant<T>{block.ref_logp[i] - block.logp[i]}).value;
  }
}

template <KlEstimator kEstimator, class T>
TETHER_CLONES void fill_kl_slope(const TokenBlock<T>& block, T* value, T* slope) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const Dual<T> logp{block.logp[i], T(1)};
    const Dual<T> term = kl_value(kEstimator, Constant<T>{block.ref_logp[i]} - logp);
    value[i] = term.value;
    slope[i] = term.grad;
  }
}

template <KlEstimator kEstimator, class T>
TETHER_CLONES void fill_kl_score(const TokenBlock<T>& block, T* score) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    score[i] = kl_score(kEstimator, Constant<T>{block.ref_logp[i] - block.logp[i]}).value;
  }
}

// Weighs K and its derivative by the token's own ratio.
template <class T>
TETHER_CLONES void weigh_by_own_ratio(T bound, TokenBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T rho = math::exp(block.logp[i] - block.old_logp[i], -bound, bound);
    block.kl[i] *= rho;
    block.dkl[i] *= rho;
  }
}

template <class T>
TETHER_CLONES void weigh(T rho, int count, T* column) {
  const int size = count / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) column[i] *= rho;  // VECTOR
}

// Adds w G of a block, whose gradient goes through the ratio that the row shares.
template <class T>
TETHER_CLONES void sum_kl_of_gradient(const TokenBlock<T>& block, LaneSum& total) {
  double sums[kLanes];
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {  // VECTOR
    double sum = 0;
    int start = 0;
    do {
      sum +=
          double(block.weight[start + lane]) * double(bounded(block.kl_of_gradient[start + lane]));
      start += kLanes;
    } while (start < block.size);
    sums[lane] = sum;
  }
  total.add(sums);
}

// Whether a token's penalty changes with the log-probabilities of the others of its row.
inline bool shares_penalty(const KlPenalty& penalty, RatioLevel level) {
  return penalty.correction == KlCorrection::level_ratio && shares_ratio(level);
}

// call(estimator), the estimator known to the compiler. Not a table of functions: the address of a
// function with clones does not resolve in a program that has the kernels twice, as tether::core
// and in libtether.so.
template <class Call>
void with_estimator(KlEstimator estimator, Call call) {
  switch (estimator) {
    case KlEstimator::k1:
      return call.template operator()<KlEstimator::k1>();
    case KlEstimator::k2:
      return call.template operator()<KlEstimator::k2>();
    case KlEstimator::k3:
      return call.template operator()<KlEstimator::k3>();
    case KlEstimator::k_lambda:  // refused at the door
      break;
  }
}

// rho K(d) with the gradient of rho G(d). At levels of sequences a correction by the level's ratio
// has rho = `row_weight`. Where the gradient goes through a ratio that the row shares, it is not
// the token's alone: dkl is then its part without the others', and `kl_of_gradient` is rho G.
template <class T>
void fill_penalty(const KlPenalty& penalty, RatioLevel level, T row_weight, TokenBlock<T>& block) {
  const bool by_row = of_level(penalty.correction) && level != RatioLevel::token;
  if (through_ratio(penalty.correction)) {
    with_estimator(penalty.gradient,
                   [&]<KlEstimator kEstimator>() { fill_kl_score<kEstimator>(block, block.dkl); });
  } else {
    with_estimator(penalty.gradient, [&]<KlEstimator kEstimator>() {
      fill_kl_slope<kEstimator>(block, block.kl, block.dkl);
    });
  }
  if (through_ratio(penalty.correction) || penalty.estimator != penalty.gradient) {
    with_estimator(penalty.estimator,
                   [&]<KlEstimator kEstimator>() { fill_kl_value<kEstimator>(block, block.kl); });
  }
  if (shares_penalty(penalty, level)) {
    with_estimator(penalty.gradient, [&]<KlEstimator kEstimator>() {
      fill_kl_value<kEstimator>(block, block.kl_of_gradient);
    });
    weigh(row_weight, block.size, block.kl_of_gradient);
  }
  if (by_row) {
    weigh(row_weight, block.size, block.kl);
    weigh(row_weight, block.size, block.dkl);
  } else if (penalty.correction != KlCorrection::none) {
    weigh_by_own_ratio(T(kWeightSaturation<T>), block);
  }
}

}  // namespace tether
