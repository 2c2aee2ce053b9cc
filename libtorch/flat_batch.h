#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../rl/policy_objective.h"
#include "policy_batch.h"

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

// Without masked slots' values, under these weights.
FlatBatch flattened(const PolicyBatch& batch, const std::vector<TokenWeight>& weights);

// The batch without the tokens that weights take out; NaN stays in its mask.
PolicyBatch gated(const PolicyBatch& batch, const PolicyObjective& objective);

// Finite log-probabilities beyond this count as this: products of their squares stay finite.
double largest_logp(bool wide);
at::Tensor saturated(const at::Tensor& x, double largest);

// [rows]
at::Tensor row_sums(const FlatBatch& batch, const at::Tensor& tokens);

// W, the product of the weights; 1 in masked slots.
at::Tensor token_weights(const std::vector<TokenWeight>& weights, const FlatBatch& batch);

}  // namespace tether::detail
