#pragma once

#include <cmath>

#include "../../core/number.h"
#include "../../core/sum.h"
#include "../kl_penalty.h"
#include "../level.h"
#include "token_block.h"

// The loops that fill the penalty of a block of tokens (rl/kl_penalty.h): K in `kl`, its derivative
// by logp in `dkl`. A form brings three of its own (estimators/kl/kl_form.h).

namespace tether {

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

// A sum with what its roundings lost (Neumaier 1974): a token's own part can be taken off again and
// leaves the others', however much smaller they are.
struct CompensatedSum {
  double sum = 0, rest = 0;

  void add(double x) {
    const double next = sum + x;
    rest += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
};

// Adds w rho G of a block, whose gradient goes through the ratio that the row shares. A broken
// token spoils the sum, as in sum_slopes.
template <class T>
void sum_kl_of_gradient(const TokenBlock<T>& block, CompensatedSum& total) {
  for (int i = 0; i < block.size; ++i) {
    const double w = double(block.weight[i]);
    if (w == 0) continue;
    const T trace = (block.ref_logp[i] - block.logp[i]) * T(0);  // 0, or NaN
    total.add(w * double(bounded(block.kl_of_gradient[i]) + trace));
  }
}

// Adds to dkl what the row's other tokens give a penalty whose ratio they share: the sum of their
// rho G, times the `scale` of the level.
template <class T>
void add_shared_penalty(double scale, const CompensatedSum& total, TokenBlock<T>& block) {
  for (int i = 0; i < block.size; ++i) {
    const double own = double(bounded(block.kl_of_gradient[i]));
    const T others = T(bounded((scale * total.sum - own) + scale * total.rest));
    block.dkl[i] = bounded(block.dkl[i]) + others;
  }
}

// Whether a token's penalty changes with the log-probabilities of the others of its row.
inline bool shares_penalty(const KlPenalty& penalty, RatioLevel level) {
  return penalty.correction == KlCorrection::level_ratio && shares_ratio(level);
}

// rho K(d) with the gradient of rho G(d). At levels of sequences a correction by the level's ratio
// has rho = `row_weight`. Where the gradient goes through a ratio that the row shares, it is not
// the token's alone: dkl is then its part without the others', and `kl_of_gradient` is rho G.
template <class T>
void fill_penalty(const KlPenalty& penalty, RatioLevel level, T row_weight, TokenBlock<T>& block) {
  const bool by_row = of_level(penalty.correction) && level != RatioLevel::token;
  const KlColumns<T> in{block.logp, block.ref_logp, block.size};
  const bool by_score = through_ratio(penalty.correction);
  by_score ? penalty.gradient.score(in, block.dkl)
           : penalty.gradient.value_and_slope(in, block.kl, block.dkl);
  if (by_score || penalty.estimator != penalty.gradient) penalty.estimator.value(in, block.kl);
  if (shares_penalty(penalty, level)) {
    penalty.gradient.value(in, block.kl_of_gradient);
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
