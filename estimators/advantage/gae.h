#pragma once

#include <array>
#include <tuple>

#include "../../core/arguments.h"
#include "../../core/batch.h"
#include "../../core/options.h"
#include "../../core/parallel.h"
#include "returns.h"

namespace tether {

// Generalized advantage estimation.
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lambda A_{t+1},     return_t = A_t + V_t
//
// Schulman et al. 2015, arXiv:1506.02438, eq. 16. After the last token V is `bootstrap` and A is 0.
// At a token that is `done`, the episode ends: V_{t+1} = A_{t+1} = 0. At one that is `truncated`,
// it is cut off, not over: A_{t+1} = 0 and V_{t+1} is its `truncation_values`.
//
// Over a masked gap nothing passes: one step lies between the tokens around it (verl, NeMo-RL).
// With decay every masked slot between tokens is a step without reward, V = gamma V_{t+1} and A =
// gamma lambda A_{t+1}. What follows the last token is padding. Masked slots are not looked at and
// come out as 0.
struct Gae {
  double gamma = 1;
  double lambda = 1;  // Schulman et al. 2017: 0.95
  MaskGap gap = MaskGap::carry;

  static constexpr auto fields() {
    return std::tuple{field("gamma", &Gae::gamma, {0, 1}), field("lambda", &Gae::lambda, {0, 1})};
  }
  static constexpr auto choices() { return std::tuple{choice("gap", &Gae::gap, kMaskGapNames)}; }
};

// Rows [B, T], or packed [N]; what is absent is 0. Slots of weight 0 may hold anything; fractional
// weights count as tokens. Constants all: no gradient flows into advantages.
template <class Array>
struct GaeInputs {
  LayoutOf<Array> layout = {};
  Array rewards = {};
  Array values = {};
  Array response_mask = {};
  Array bootstrap = {};          // [B], the value after the last token
  Array done = {};               // the episode ends at this token
  Array truncated = {};          // it is cut off, not over
  Array truncation_values = {};  // needed with truncated
  Array lambdas = {};            // [B] or per token, in [0, 1], goes before options.lambda: VAPO's
                                 // length-adaptive lambda, arXiv:2504.05118
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = GaeInputs;
    using A = Argument<In, Array>;
    constexpr auto optional = Use::optional;
    return std::array{
        A{"rewards", &In::rewards, Shape::rows},
        A{"values", &In::values, Shape::tokens},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"bootstrap", &In::bootstrap, Shape::per_row, Kind::floating, optional},
        A{"done", &In::done, Shape::tokens, Kind::flags, optional},
        A{"truncated", &In::truncated, Shape::tokens, Kind::flags, optional},
        A{"truncation_values", &In::truncation_values, Shape::tokens, Kind::floating, optional},
        A{"lambdas", &In::lambdas, Shape::either, Kind::floating, optional}};
  }
};
using GaeArrays = GaeInputs<ConstArray>;

// Recursions are in double; the same bits for every executor.
void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor = {});

}  // namespace tether
