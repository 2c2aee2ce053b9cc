#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "../rl/kernels/arrays.h"
#include "../rl/policy_metrics.h"

namespace tether {

// One batch of token rows (rl/kernels/arrays.h). An undefined tensor is absent. Log-probabilities
// are in nats, [B, T], or packed [N] with offsets [B + 1], int32 or int64, from 0 to N: row i is
// offsets[i] .. offsets[i + 1]. Advantages are [B], [B, 1] or like logps.
//
// logps may be float32, float64, bfloat16 or float16, of any strides; arithmetic is in float32, in
// float64 for float64. The mask is bool, integers or weights in [0, 1]; the other arrays may be
// narrower than logps, not wider. Only logps and entropies get a gradient.
using PolicyBatch = PolicyInputs<at::Tensor>;

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
