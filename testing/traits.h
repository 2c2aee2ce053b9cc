#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "../libtorch/policy_loss.h"
#include "report.h"

namespace tether::testing {

// The gradient is taken by torch's autograd, with respect to batch.logps.
using PolicyLoss = std::function<Result(const PolicyBatch& batch, const Normalizer& step)>;

// Of a policy loss the ratio's interval [1 - low, 1 + high]: beyond it, on the side that the
// advantage asks for, there is no gradient. Nor is there beyond `dual`, for a bad token.
// Of a value loss the interval [old - low, old + high] of the value.
struct ClipRange {
  double low = 0.2;
  double high = 0.2;
  double dual = infinity;
};

// What a loss promises. The defaults are what a good loss in plain torch can keep.
struct LossTraits {
  bool takes_normalizer = true;       // divides by the counts of the step, not by its own, if given
  bool takes_offsets = false;         // packed rows
  bool takes_row_advantages = false;  // policy: [B]; else advantages are like logps
  bool takes_no_old_logps = false;    // policy: absent: logps, as constants
  bool takes_fractional_mask = true;  // weights between 0 and 1
  bool takes_half_precision = true;   // widens bfloat16 and float16
  bool needs_ref_logps = false;       // policy: has a KL penalty, which pulls to the reference
  bool needs_labels = false;          // preference: of single answers, not of pairs
  bool takes_answer_numbers = false;  // preference: baselines and weights of answers
  bool needs_rollout_logps = false;   // policy: has a weight that compares with them
  bool needs_turn_ids = false;        // policy: the level of its ratio is a turn
  bool stops_tokens = false;          // policy: a weight may be 0, beyond any clip
  bool takes_tokens_out = false;      // policy: by a weight that changes the mask
  bool is_function_of_log_ratio = true;  // of logps - old_logps, and ref_logps - logps
  bool scales_with_advantages = true;    // policy: where the penalty is 0
  bool is_per_token = true;              // policy: false: a row's tokens share a ratio (rl/level.h)
  bool gradient_is_derivative = true;    // false where a gradient is stopped or straight through
  bool survives_runaways = true;         // finite for any log-ratio
  bool penalty_pulls = true;  // a token's penalty pulls it; not if its row's others do so as well
  bool pulls_back = true;     // what ran away to the wrong side has a gradient that brings it back
  bool bitwise = false;       // any number of threads, padding, strides: not one bit changes
  bool refuses_double_backward = false;
  std::optional<ClipRange> clip = {};
  PolicyLoss reference = {};  // policy: the same loss by other means, called with float64
  std::function<Normalizer(const PolicyBatch&)> counts = {};  // policy; absent: those of the mask
  double tolerance = 64;  // rounding allowed, in epsilons of the sum of the terms' magnitudes
  std::vector<at::ScalarType> dtypes = {at::kFloat, at::kDouble};
};

}  // namespace tether::testing
