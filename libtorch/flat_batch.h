#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../rl/level.h"
#include "../rl/policy_objective.h"
#include "policy_batch.h"

namespace tether::detail {

// The tokens of a batch side by side in one dimension, 0 in masked slots.
struct FlatBatch {
  at::Tensor weight, active;  // [N]
  at::Tensor row;             // [N], the row of each token
  int64_t rows;
  at::Tensor logp, old_logp, ref_logp, rollout_logp, advantage, entropy;  // [N]
  at::Tensor row_tokens;                 // [rows], the weights of each row
  at::Tensor token_weight;               // [N], W
  at::Tensor kl_weight, entropy_weight;  // [N], of the caller

  const at::Tensor& logp_of(KlReference policy) const;
};

// Without masked slots' values, under these weights.
FlatBatch flattened(const PolicyBatch& batch, const std::vector<TokenWeight>& weights);

// The batch without the tokens that weights take out, its turns as they were; NaN stays in its
// mask.
PolicyBatch gated(const PolicyBatch& batch, const PolicyObjective& objective);

// [N], the row of each of these tokens, padded or packed.
at::Tensor row_of_tokens(const at::Tensor& tokens, const at::Tensor& offsets, int64_t rows);

// Finite log-probabilities beyond this count as this: products of their squares stay finite.
double largest_input(bool wide);
// Advantages as a surrogate sees them beside their ratios (rl/kernels/bounds.h).
at::Tensor beside_ratio(const at::Tensor& advantage, const at::Tensor& log_ratio);
at::Tensor saturated(const at::Tensor& x, double largest);

// [rows]
at::Tensor row_sums(const FlatBatch& batch, const at::Tensor& tokens);

// The tokens that share a ratio (rl/level.h).
struct FlatSegments {
  at::Tensor index;  // [N], the segment of each token
  int64_t count;     // at least as many as there are
  at::Tensor n;      // [count], the weights of each

  at::Tensor sums(const at::Tensor& tokens) const;    // [count]
  at::Tensor spread(const at::Tensor& values) const;  // [N]
};
// Those of rows or turns. `turn_ids` [N].
FlatSegments segments_of(const FlatBatch& batch, Segment segment, const at::Tensor& turn_ids);

// [N], by ids or runs of the mask.
at::Tensor turn_ids_of(const PolicyBatch& batch);

// The product of the weights; 1 in masked slots. `turn_ids` [N], where one is of turns.
at::Tensor token_weights(const std::vector<TokenWeight>& weights, const FlatBatch& batch,
                         const at::Tensor& turn_ids);

// 1 / denominator of each row's terms, as row_factor (rl/aggregation.h), without a look at the
// values. `lengths`: what a row's own mean is over.
at::Tensor row_factors(const Aggregation& aggregation, const std::optional<double>& tokens,
                       const std::optional<double>& sequences, const at::Tensor& row_tokens,
                       const at::Tensor& lengths);

// What overflowed as the largest number, with the gradient as it is (rl/kernels/token_block.h).
at::Tensor bounded(const at::Tensor& x);
// A sum in double as the result for `input`: beyond its type the largest number of that.
at::Tensor narrowed(const at::Tensor& sum, const at::Tensor& input);

// d value / d x, 0 where it does not depend on it.
at::Tensor derivative(const at::Tensor& value, const at::Tensor& x);

// 0, or NaN with a gradient of NaN by x where it is not sound.
at::Tensor spoiled(const at::Tensor& sound, const at::Tensor& x);

}  // namespace tether::detail
