#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "../rl/policy_metrics.h"

namespace tether {

// One batch of token rows. An undefined tensor is absent. Log-probabilities are in nats.
//
// logps may be float32, float64, bfloat16 or float16, of any strides; arithmetic is in float32, in
// float64 for float64. The other arrays may be narrower, not wider. Only logps and entropies get a
// gradient.
struct PolicyBatch {
  at::Tensor logps;       // [B, T], or packed [N] with offsets
  at::Tensor advantages;  // [B] or [B, 1], or like logps, as which [B] is read if B = N
  at::Tensor
      response_mask;  // like logps; bool, or weights in [0, 1]: slots of weight 0 may hold anything
  at::Tensor old_logps = {};  // like logps; absent: logps, as constants
  at::Tensor ref_logps = {};  // like logps; needed when beta > 0
  at::Tensor entropies = {};  // like logps, of the policy; needed when entropy_coef is not 0
  at::Tensor offsets =
      {};  // [B + 1] int32 or int64, from 0 to N: row i is offsets[i] .. offsets[i + 1]
};

// PolicyMetrics on the device of the loss: [value, count] pairs [kSums, 2] and maxima [kMaxima], in
// float64. For the figures of a step over ranks: all-reduce `sums` by sum and `maxima` by max.
struct PolicyMetricTensors {
  at::Tensor sums;
  at::Tensor maxima;

  // Copies to the host: the one synchronisation, and the caller asks for it.
  PolicyMetrics to_host() const;
  std::map<std::string, double> to_map() const;
};

struct LossOutput {
  at::Tensor loss;  // scalar, of the dtype of the arithmetic
  PolicyMetricTensors metrics;
};

}  // namespace tether
