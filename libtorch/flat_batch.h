#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../rl/token_weight.h"

namespace tether::detail {

// The tokens of a batch side by side in one dimension, 0 in masked slots.
struct FlatBatch {
  at::Tensor weight, active;  // [N]
  at::Tensor row;             // [N], the row of each token
  int64_t rows;
  at::Tensor logp, old_logp, ref_logp, rollout_logp, advantage, entropy;  // [N]
  at::Tensor row_tokens;    // [rows], the weights of each row
  at::Tensor token_weight;  // [N], W
};

// [rows]
at::Tensor row_sums(const FlatBatch& batch, const at::Tensor& tokens);

// W, the product of the weights; 1 in masked slots.
at::Tensor token_weights(const std::vector<TokenWeight>& weights, const FlatBatch& batch);

}  // namespace tether::detail
