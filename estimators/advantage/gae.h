#pragma once

#include "../../core/batch.h"
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
  double gamma = 1;   // in [0, 1]
  double lambda = 1;  // in [0, 1]; Schulman et al. 2017: 0.95
  MaskGap gap = MaskGap::carry;
};

// Rows [B, T]; absent arrays are 0, and `lambdas`, per_row or per token, goes before
// options.lambda. Fractional weights count as tokens.
struct GaeArrays {
  RowLayout layout;
  ConstArray rewards, values, response_mask;
  ConstArray bootstrap = {};             // per_row
  ConstArray done = {}, truncated = {};  // not 0: true
  ConstArray truncation_values = {};     // needed with truncated
  ConstArray lambdas = {};               // VAPO's length-adaptive lambda, arXiv:2504.05118
};

// Recursions are in double; the same bits for every executor.
void generalized_advantage_estimation(const GaeArrays& batch, const Gae& options,
                                      const MutableArray& advantages, const MutableArray& returns,
                                      const Executor& executor = {});

}  // namespace tether
