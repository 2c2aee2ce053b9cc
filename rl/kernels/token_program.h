#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../../core/batch.h"
#include "../../core/elements.h"
#include "../../core/macros.h"
#include "../../core/math.h"
#include "../../core/number.h"
#include "../../core/select.h"
#include "../aggregation.h"
#include "../kl_penalty.h"
#include "../level.h"
#include "../policy_metrics.h"
#include "../surrogate.h"
#include "arrays.h"
#include "bounds.h"
#include "turn_table.h"

// What one token adds to a policy loss on a CUDA device: as the loops over blocks have it
// (token_block.h, penalty_block.h), in float, always within their bounds.

namespace tether::cuda {

// What the rows of a call share.
// The mask of the batch is that of the tokens that no weight takes out, its weights are W.
struct PolicyParameters : PolicyArrays {
  ConstArray anchor_logps;  // of the policy that the penalty ties to; absent: logps
  MutableArray dlogps, dentropies;

  Segment segment;          // of the level
  bool is_mean, is_shared;  // likewise
  TurnTable turns;          // where the segment is a turn
  int64_t pieces;           // of a row
  LogRatioClip clip;        // off where log-ratios are not clipped
  RatioInterval truncation;
  double beta;
  int estimator, gradient;  // of the penalty, in the order of the catalogue
  KlCorrection correction;
  KlWeightBounds bounds;
  double entropy_coefficient;
  Aggregation aggregation;
  double factor;         // of the whole loss
  const double* counts;  // of the step: policy, kl, sequences
};

TETHER_TEAM float load_weight(const RowLayout& layout, const ConstArray& array, int64_t row,
                              int64_t column) {
  return array ? saturated(load(layout, array, row, column), Largest<float>::kWeight) : 1.0f;
}

// One token. Where w is 0 nothing else is looked at.
struct LoadedToken {
  float w = 0, logp = 0, old_logp = 0, advantage = 0, ref_logp = 0, anchor_logp = 0;

  TETHER_TEAM LoadedToken(const PolicyParameters& in, int64_t row, int64_t column)
      : w(load_mask(in.layout, in.response_mask, row, column)) {
    if (w != 0) load_rest(in, row, column, load(in.layout, in.logps, row, column));
  }
  // Of a weight that is not 0, with a log-probability that is in no array.
  TETHER_TEAM LoadedToken(const PolicyParameters& in, int64_t row, int64_t column, float weight,
                          float own_logp)
      : w(weight) {
    load_rest(in, row, column, own_logp);
  }

 private:
  TETHER_TEAM void load_rest(const PolicyParameters& in, int64_t row, int64_t column,
                             float own_logp) {
    const auto number = [&](const ConstArray& array, float largest) {
      return saturated(load(in.layout, array, row, column), largest);
    };
    constexpr float kLogp = Largest<float>::kInput;
    logp = saturated(own_logp, kLogp);
    old_logp = in.old_logps ? number(in.old_logps, kLogp) : logp;
    advantage = number(in.advantages, Largest<float>::kInput);
    if (in.ref_logps) ref_logp = number(in.ref_logps, kLogp);
    if (in.beta > 0) anchor_logp = in.anchor_logps ? number(in.anchor_logps, kLogp) : logp;
  }
};

struct RowFactors {
  float loss, kl;
};

// A form of the catalogue, by its place there.
template <size_t kIndex>
using KlFormAt = std::remove_cvref_t<decltype(std::get<kIndex>(kKlCatalogue).defaults)>;

inline constexpr size_t kKlForms = kKlFormNames.size();

struct CataloguedKlForm {
  int index;

  template <size_t kIndex = 0, class Number>
  TETHER_INLINE Number operator()(const Number& d) const {
    static_assert(std::is_empty_v<KlFormAt<kIndex>>, "a form with options needs them here");
    if constexpr (kIndex + 1 == kKlForms) {
      return KlFormAt<kIndex>{}(d);
    } else {
      return index == int{kIndex} ? KlFormAt<kIndex>{}(d) : operator()<kIndex + 1>(d);
    }
  }
  template <size_t kIndex = 0, class Number>
  TETHER_INLINE Number score(const Number& d) const {
    if constexpr (kIndex + 1 == kKlForms) {
      return kl_score(KlFormAt<kIndex>{}, d);
    } else {
      return index == int{kIndex} ? kl_score(KlFormAt<kIndex>{}, d) : score<kIndex + 1>(d);
    }
  }
};

// v rho K(d) with its gradient; v is the caller's weight.
TETHER_TEAM Dual<float> penalty_of(const PolicyParameters& in, const LoadedToken& token,
                                   const SegmentRatio& shared, int64_t row, int64_t column) {
  const float v = load_weight(in.layout, in.kl_weights, row, column);
  const Dual<float> logp{token.logp, 1};
  const bool of_segment = in.segment != Segment::token && of_level(in.correction);
  const bool of_rollout = sampler_of(in.correction) == KlReference::rollout;
  const float sampler_logp =
      of_rollout ? saturated(load(in.layout, in.rollout_logps, row, column), Largest<float>::kInput)
                 : token.old_logp;
  const Dual<float> log_ratio =
      of_segment ? Dual<float>{shared.log_ratio, 0} : logp - Constant<float>{sampler_logp};
  const Dual<float> k =
      kl_term(CataloguedKlForm{in.estimator}, CataloguedKlForm{in.gradient}, in.correction, logp,
              log_ratio, Constant<float>{token.anchor_logp}, in.bounds);
  const float trace = v * 0 + sampler_logp * 0;
  return {bounded(k.value * v + trace), bounded(k.grad * v + trace)};
}

// What the tokens of one thread add up to.
struct TokenSums {
  static constexpr int kTerms = 4;  // in double: the losses, and the slope of the row's ratio
  static constexpr int kMetrics = PolicyMetrics::kSums;

  double loss = 0, kl = 0, entropy = 0, slope = 0;
  float tokens = 0;
  float metrics[kMetrics] = {};  // but for the terms
  float log_ratio_max = -math::detail::Format<float>::kInfinity;
  float neg_log_ratio_max = -math::detail::Format<float>::kInfinity;
  float weight_max = -math::detail::Format<float>::kInfinity;

  TETHER_TEAM void add_clipped(const RatioInterval& inside, float w, float d, float ratio, float A,
                               float dloss) {
    using M = PolicyMetrics;
    const bool stuck = dloss == 0;
    const bool below = stuck ? d < 0 && A != 0 : ratio < static_cast<float>(inside.low);
    const bool above = stuck ? d > 0 : ratio > static_cast<float>(inside.high);
    metrics[M::kClipFractionLow] += below ? w : 0;
    metrics[M::kClipFractionHigh] += above && A > 0 ? w : 0;
    metrics[M::kClipFractionDual] += above && A < 0 ? w : 0;
  }
  TETHER_TEAM void add_ratio(float w, float d, float ratio, float k3, bool seen) {
    using M = PolicyMetrics;
    const float bounded_ratio = bounded(ratio, kLargestRatio<float>);
    metrics[M::kRatio] += w * bounded_ratio;
    metrics[M::kRatioSquared] += w * bounded_ratio * bounded_ratio;
    metrics[M::kApproxKlK1] -= w * d;
    metrics[M::kApproxKlK3] += w * k3;
    if (!seen) return;
    log_ratio_max = fmaxf(log_ratio_max, d);
    neg_log_ratio_max = fmaxf(neg_log_ratio_max, -d);
  }
  TETHER_TEAM void add_weight(float w, float given) {
    using M = PolicyMetrics;
    const float W = bounded(given, kLargestRatio<float>);
    metrics[M::kWeight] += w * W;
    metrics[M::kWeightSquared] += w * W * W;
    metrics[M::kWeightZero] += W == 0 ? w : 0;
    weight_max = fmaxf(weight_max, W);
  }
};

// The surrogate of a token: its own log-ratio, or that of its segment.
template <class Formula>
TETHER_TEAM Dual<float> surrogate_of(const Formula& formula, const PolicyParameters& in,
                                     const LoadedToken& token, const SegmentRatio& shared,
                                     float log_ratio, float ratio) {
  const float logp = in.is_shared ? shared.logp : token.logp;
  const float advantage = beside_ratio(token.advantage, ratio);
  const Token<Dual<float>, Constant<float>> seen{{logp, 1},   {log_ratio, 1},   {ratio, ratio},
                                                 {advantage}, {token.old_logp}, {token.ref_logp}};
  const Dual<float> loss = formula(seen);
  return {bounded(loss.value), bounded(loss.grad)};
}

// What the loss changes by with one token.
struct TokenSlopes {
  float logp = 0;   // d loss / d logp, where no other token has a part in it
  float ratio = 0;  // w W dS/dL
};

// Adds a token of weight w > 0, or NaN.
template <class Formula>
TETHER_TEAM TokenSlopes add_token(const Formula& formula, const PolicyParameters& in,
                                  const RowFactors& factors, const SegmentRatio& shared,
                                  int64_t row, int64_t column, const LoadedToken& token,
                                  TokenSums& sums) {
  const float w = token.w;
  const float d = in.segment == Segment::token ? token.logp - token.old_logp : shared.log_ratio;
  constexpr float kBound = kSaturation<float>;
  const auto both = math::exp_and_expm1_minus(d, -kBound, kBound);
  const Dual<float> S = surrogate_of(formula, in, token, shared, d, both.exp);
  float loss = S.value, slope = S.grad, trace = w * 0;
  if (in.token_weights) {
    const float W = load_weight(in.layout, in.token_weights, row, column);
    loss = bounded(W * loss);
    slope = bounded(W * slope);
    trace += W * 0;
    sums.add_weight(w, W);
  }
  float gradient = bounded(w * factors.loss * slope);
  if (in.beta > 0) {
    const Dual<float> K = penalty_of(in, token, shared, row, column);
    gradient = bounded(gradient + bounded(w * factors.kl * K.grad));
    trace += K.value * 0 + token.anchor_logp * 0;
    sums.kl += static_cast<double>(w * K.value);
  }
  trace += zero_or_nan(d, token.advantage, loss, gradient);
  const bool broken = trace != 0;
  sums.tokens += w;
  sums.loss += static_cast<double>(broken ? kNaN : w * loss);
  sums.metrics[PolicyMetrics::kNonfinite] += broken ? 1 : 0;
  const float of_ratio = w * shared.share;
  sums.add_clipped(in.truncation, of_ratio, d, both.exp, token.advantage, S.grad);
  sums.add_ratio(of_ratio, d, both.exp, both.expm1_minus, !broken);
  if (broken) return {kNaN, kNaN};
  return {gradient, w * slope};
}

// The gradient of a token that shares its ratio: `slope` is d loss / d logp of any over w.
TETHER_TEAM float shared_gradient(const PolicyParameters& in, const RowFactors& factors,
                                  const SegmentRatio& shared, double slope, int64_t row,
                                  int64_t column, const LoadedToken& token) {
  const double u = static_cast<double>(token.logp) - static_cast<double>(token.old_logp);
  const bool beyond = clipped(u, token.advantage, in.clip) != u && u - u == 0;
  const double w = token.w;  // what is beyond a float meets it first
  float gradient = beyond ? 0 : narrow<float>(w * slope);
  bool broken = false;
  if (in.beta > 0) {
    const float dkl = penalty_of(in, token, shared, row, column).grad;
    const double penalty = static_cast<double>(factors.kl) * static_cast<double>(dkl);
    gradient = bounded(gradient + narrow<float>(w * penalty));
    broken = zero_or_nan(token.anchor_logp, dkl, 0.0f, 0.0f) != 0;
  }
  return broken ? kNaN : gradient;
}

// Of the entropy of a token.
TETHER_TEAM float entropy_weight(const PolicyParameters& in, int64_t row, int64_t column, float w) {
  return w * load_weight(in.layout, in.entropy_weights, row, column);
}

// Adds the entropy of a token and returns its gradient.
TETHER_TEAM float add_entropy(const PolicyParameters& in, float factor, int64_t row, int64_t column,
                              float w, TokenSums& sums) {
  const float weight = entropy_weight(in, row, column, w);
  const float given = load(in.layout, in.entropies, row, column);
  const float entropy =
      weight * (in.entropy_weights ? saturated(given, Largest<float>::kInput) : given);
  sums.entropy += static_cast<double>(entropy + entropy * 0);  // infinity is NaN
  sums.metrics[PolicyMetrics::kNonfinite] += entropy - entropy != 0 ? 1 : 0;
  return bounded(-factor * weight);
}

}  // namespace tether::cuda
