#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "examples/text2sql/sampler.h"
#include "libtorch/tether.h"

namespace text2sql {

// A prompt with its samples. All of them share the prompt's part of the computation.
struct Group {
  Ids prompt;
  std::vector<Ids> completions;
  at::Tensor rewards;     // [samples]
  at::Tensor advantages;  // [samples]
};

// Groups of similar length, computed together. One packed row per completion.
struct MicroBatch {
  at::Tensor prompts, prompt_lengths;  // [groups, P] padded left, [groups]; without <sql>
  at::Tensor inputs;                   // [rows, T] padded right: <sql> and all tokens but the last
  at::Tensor at_response;              // [tokens]: which of rows * T
  at::Tensor targets;                  // [tokens]
  at::Tensor offsets;                  // [rows + 1]
  at::Tensor response_mask;            // [tokens], all true: packed rows have no padding
  at::Tensor rewards;                  // [rows]
  at::Tensor advantages;               // [rows], or [tokens] from a value head
  at::Tensor old_logps = {};           // [tokens]
  at::Tensor ref_logps = {};           // [tokens]
  at::Tensor rollout_logps = {};       // [tokens], under the policy that sampled them
  at::Tensor old_values = {};          // [tokens], of a value head
  at::Tensor returns = {};             // [tokens]
};

// What one optimizer step is made of.
struct Minibatch {
  std::vector<MicroBatch> parts;
  tether::Normalizer counts;     // of the whole minibatch, so that the parts' losses add up
  tether::PairNormalizer pairs;  // the same, where groups are a chosen and a rejected answer
};

// Groups with equal rewards have advantages of exactly 0: without a KL penalty they add nothing to
// the loss or its gradient, and are counted but not computed.
Minibatch make_minibatch(std::vector<Group> groups, const tether::PolicyObjective& objective);

// The tokens of rows that alternate between chosen and rejected answers, all chosen ones first.
struct PairOrder {
  at::Tensor tokens, offsets;
};
PairOrder chosen_first(const at::Tensor& offsets);

struct CompletionOutput {
  tether::TokenLogps tokens;
  at::Tensor values;  // [tokens]: of the state before each token
};
CompletionOutput evaluate(Transformer& model, const MicroBatch& batch);

tether::TokenLogps completion_logps(Transformer& model, const MicroBatch& batch);

// Generalized advantage estimation with the model's values: the reward comes with the last token.
// Advantages are whitened over the whole step.
void estimate_advantages(Transformer& model, std::vector<Minibatch>& step, double lambda);

}  // namespace text2sql
