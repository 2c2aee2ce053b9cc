#pragma once

#include "../../core/arguments.h"
#include "../../core/batch.h"

namespace tether {

// How far the trainer's policy is from the engine that sampled: what importance weights will do,
// before they do it.

// Rows [B, T], or packed [N].
template <class Array>
struct MismatchInputs {
  LayoutOf<Array> layout = {};
  Array old_logps = {};      // of the trainer, before the step
  Array rollout_logps = {};  // of the engine
  Array response_mask = {};
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = MismatchInputs;
    using A = Argument<In, Array>;
    return std::array{A{"old_logps", &In::old_logps, Shape::rows},
                      A{"rollout_logps", &In::rollout_logps, Shape::tokens},
                      A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask}};
  }
};
using MismatchArrays = MismatchInputs<ConstArray>;

// Of the ratios r = trainer / engine at one level, each token or sequence counted once.
struct RatioSpread {
  double mean = 0;  // 1 in expectation
  double min = 0, max = 0;
  double chi2 = 0;  // mean r^2 - 1: the variance that the weights bring
  double ess = 0;   // (sum r)^2 / (n sum r^2), in (0, 1]
};

struct MismatchReport {
  double tokens = 0, sequences = 0;
  double k1 = 0, k3 = 0;  // of KL(engine || trainer), mean over tokens [nats]
  // Mean over sequences of e^-(mean log-probability of its tokens).
  double perplexity = 0, rollout_perplexity = 0;
  double probability_gap = 0, probability_gap_max = 0;  // |p_trainer - p_engine| of the tokens
  RatioSpread token;
  RatioSpread sequence_mean;  // of e^mean x: the geometric mean of a sequence's ratios
  RatioSpread sequence_sum;   // of e^sum x: the ratio of whole sequences
};

// x = old_logp - rollout_logp. In an exponent x beyond +-300, or a sum of it, counts as that. A
// number that is not finite makes what it enters NaN. Zeros without tokens.
MismatchReport mismatch_report(const MismatchArrays& batch);

}  // namespace tether
