#pragma once

#include <array>

#include "../../core/arguments.h"
#include "../../core/batch.h"
#include "../policy_metrics.h"
#include "../preference_metrics.h"
#include "../value_metrics.h"

// What the kernels take and give: batches in the caller's memory, gradients, totals.

namespace tether {

// One batch of token rows for a policy loss, in the caller's memory. Arithmetic is in double if
// logps are float64, else in float; arrays may differ in type and stride.
template <class Array>
struct PolicyInputs {
  LayoutOf<Array> layout = {};
  Array logps = {};
  Array advantages = {};     // per token, or per row
  Array response_mask = {};  // weights in [0, 1]; slots of weight 0 may hold anything
  Array old_logps = {};      // absent: logps, as constants (the ratio is 1, its gradient is not 0)
  Array ref_logps = {};      // needed when beta > 0
  Array entropies = {};      // of the policy at each token; needed when entropy_coef is not 0
  Array rollout_logps = {};  // under the engine that sampled; needed where a weight compares
  Array turn_ids = {};  // of levels of turns; do not decrease along a row; absent: runs of the mask
  // Of the terms S, K and H at each token, any numbers; absent: 1. Denominators do not see them.
  Array token_weights = {};
  Array kl_weights = {};
  Array entropy_weights = {};
  Array row_tokens = {};  // what sequence_mean_token_mean divides each row by; absent: its tokens
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = PolicyInputs;
    using A = Argument<In, Array>;
    constexpr auto optional = Use::optional;
    return std::array{
        A{"logps", &In::logps, Shape::rows, Kind::floating, Use::required, Flow::differentiable},
        A{"advantages", &In::advantages, Shape::either, Kind::narrow},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"old_logps", &In::old_logps, Shape::tokens, Kind::narrow, optional},
        A{"ref_logps", &In::ref_logps, Shape::tokens, Kind::narrow, optional},
        A{"entropies", &In::entropies, Shape::tokens, Kind::narrow, optional, Flow::differentiable},
        A{"rollout_logps", &In::rollout_logps, Shape::tokens, Kind::narrow, optional},
        A{"turn_ids", &In::turn_ids, Shape::tokens, Kind::ids, optional},
        A{"token_weights", &In::token_weights, Shape::tokens, Kind::mask, optional},
        A{"kl_weights", &In::kl_weights, Shape::tokens, Kind::mask, optional},
        A{"entropy_weights", &In::entropy_weights, Shape::tokens, Kind::mask, optional},
        A{"row_tokens", &In::row_tokens, Shape::per_row, Kind::counts, optional}};
  }
};
using PolicyArrays = PolicyInputs<ConstArray>;

// Where the gradients go, each like logps in shape; absent: not wanted.
struct PolicyGradients {
  MutableArray logps = {};
  MutableArray entropies = {};
};

struct PolicyTotals {
  double loss = 0;
  PolicyMetrics metrics;
};

// Answers in the caller's memory. Pairs are 2 B rows, all chosen answers first, then the rejected
// ones in the same order (TRL's layout); with labels every row is an example of its own. Scores of
// whole answers are rows of one column. Token sums are in double; arrays may differ in type and
// stride.
template <class Array>
struct PreferenceInputs {
  LayoutOf<Array> layout = {};
  Array logps = {};
  Array ref_logps = {};       // needed where the objective has a reference
  Array response_mask = {};   // weights in [0, 1]; slots of weight 0 may hold anything
  Array nll_mask = {};        // the tokens of the NLL; absent: those of the response
  Array labels = {};          // whether a row is a good answer: above 1/2; of losses without pairs
  Array baselines = {};       // what the scores are compared with; absent: 0
  Array answer_weights = {};  // of the loss, at least 0; absent: 1
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = PreferenceInputs;
    using A = Argument<In, Array>;
    constexpr auto optional = Use::optional;
    return std::array{
        A{"logps", &In::logps, Shape::rows, Kind::floating, Use::required, Flow::differentiable},
        A{"ref_logps", &In::ref_logps, Shape::tokens, Kind::narrow, optional},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"nll_mask", &In::nll_mask, Shape::tokens, Kind::mask, optional},
        A{"labels", &In::labels, Shape::per_row, Kind::mask, optional},
        A{"baselines", &In::baselines, Shape::per_row, Kind::floating, optional},
        A{"answer_weights", &In::answer_weights, Shape::per_row, Kind::counts, optional}};
  }
};
using PreferenceArrays = PreferenceInputs<ConstArray>;

struct PreferenceTotals {
  double loss = 0;
  PreferenceMetrics metrics;
};

// Rows of tokens for the loss of a value head, in the caller's memory. Arithmetic is in double if
// values are float64, else in float.
template <class Array>
struct ValueInputs {
  LayoutOf<Array> layout = {};
  Array values = {};
  Array returns = {};
  Array response_mask = {};  // weights in [0, 1]; slots of weight 0 may hold anything
  Array old_values = {};     // absent: values, as constants (nothing is clipped)
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = ValueInputs;
    using A = Argument<In, Array>;
    return std::array{
        A{"values", &In::values, Shape::rows, Kind::floating, Use::required, Flow::differentiable},
        A{"returns", &In::returns, Shape::tokens},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"old_values", &In::old_values, Shape::tokens, Kind::floating, Use::optional}};
  }
};
using ValueArrays = ValueInputs<ConstArray>;

struct ValueTotals {
  double loss = 0;
  ValueMetrics metrics;
};

}  // namespace tether
