#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace text2sql {

struct TransformerOptions {
  int64_t vocabulary = 384;
  int64_t width = 96;
  int64_t layers = 3;
  int64_t heads = 4;
  int64_t mlp_factor = 4;
  int64_t max_length = 192;  // positions of the rotary table
};

// What later tokens see of a batch of prompts: the keys and values of every layer. The prompts are
// padded on the left, so that a row's first new token is at position `length` in every row, and
// rotary positions, which act only through differences, need no offset per row.
struct Context {
  std::vector<at::Tensor> keys = {};    // by layer, [B, heads, capacity, width / heads]
  std::vector<at::Tensor> values = {};  // like keys
  at::Tensor mask = {};                 // [B, 1, 1, capacity], added to scores: 0 or kMasked
  int64_t length = 0;                   // positions in use, at most the capacity

  Context repeat_interleave(int64_t times) const;  // one row per sample instead of one per prompt
  void reserve(int64_t more);                      // room for `more` tokens; for step()
  void select_rows(const at::Tensor& rows);        // keeps these rows
};

// Finite, so that a padded query, which sees nothing else, stays finite.
inline constexpr float kMasked = -1e9f;

// Decoder-only transformer: pre-RMSNorm, rotary positions (Su et al. 2021, arXiv:2104.09864), GELU,
// no biases, no dropout, output projection tied to the embedding.
//
// Three ways through the same blocks give hidden states ("hidden"), which logits() projects:
//   rows     whole sequences, padded on the right; for supervised training
//   extend   completions of the prompts of a Context, differentiable through the prompts as well
//   step     one more token per row, written into the Context; for sampling, without gradients
class Transformer : public torch::nn::Module {
 public:
  explicit Transformer(const TransformerOptions& options, uint64_t seed);

  at::Tensor rows(const at::Tensor& tokens);                            // [B, T] -> [B, T, width]
  Context read(const at::Tensor& prompts, const at::Tensor& lengths);   // [B, P] padded left, [B]
  at::Tensor extend(const at::Tensor& tokens, const Context& context);  // [B, T] -> [B, T, width]
  at::Tensor step(const at::Tensor& tokens, Context& context);          // [B] -> [B, width]
  at::Tensor logits(const at::Tensor& hidden) const;                    // [.., vocabulary]
  at::Tensor values(const at::Tensor& hidden) const;  // [..]: the value head, for PPO

  const TransformerOptions& options() const { return options_; }
  int64_t parameter_count() const;

 private:
  struct Block {
    at::Tensor attention_norm, attention_in, attention_out, mlp_norm, mlp_in, mlp_out;
  };

  // `attend` maps (layer, queries, keys, values), each [B, heads, T, width / heads], to the same
  // shape; keys and queries are already rotated to positions first_position, first_position + 1 ..
  template <class Attend>
  at::Tensor run(const at::Tensor& tokens, int64_t first_position, const Attend& attend);

  TransformerOptions options_;
  at::Tensor embedding_;   // [vocabulary, width]
  at::Tensor final_norm_;  // [width]
  at::Tensor value_head_;  // [width], 0 until PPO trains it
  at::Tensor rotary_;      // [max_length, width], complex: both queries and keys of all heads
  std::vector<Block> blocks_;
};

// A copy that no gradient reaches.
std::shared_ptr<Transformer> frozen_copy(const Transformer& model);
// Parameters of `from` into `to`, which has the same options.
void copy_parameters(const Transformer& from, Transformer& to);

}  // namespace text2sql
