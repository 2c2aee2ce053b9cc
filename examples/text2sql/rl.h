#pragma once

#include <torch/optim/adamw.h>

#include <cstdint>
#include <vector>

#include "examples/text2sql/grader.h"
#include "examples/text2sql/objectives.h"
#include "examples/text2sql/rl_batch.h"

namespace text2sql {

struct RlOptions {
  Objective objective;
  int64_t steps = 100;
  int64_t prompts = 32;  // per step
  int64_t samples = 8;   // per prompt: a group
  int64_t minibatches = 2;
  int64_t stale = 0;  // the sampler's weights are up to so many steps old
  int64_t max_tokens = 72;
  double learning_rate = 3e-4;  // after the warm-up; linear down to `final_share` of it
  double final_share = 0.1;
  int64_t warmup_steps = 5;
  double max_gradient_norm = 1;
  uint64_t seed = 0;
};

struct RlStep {
  std::vector<Answer> answers;    // every sample; the reward is 1 if it is correct, otherwise 0
  tether::PolicyMetrics metrics;  // over the tokens that were trained on
  tether::PreferenceMetrics preference;  // over the pairs, of a preference objective
  tether::ValueMetrics values;           // over the same tokens, of a value head
  double tokens = 0;                     // that were trained on
  double entropy = 0;                    // mean over the same tokens, nats
  double gradient_norm = 0;              // before clipping, mean over the minibatches

  double reward() const;
};

// Reinforcement learning from verifiable rewards: sample, run the queries, follow the objective.
// Like SftTrainer, step k depends on weights, those of the sampler too, optimizer, options and k
// only.
class RlTrainer {
 public:
  // `sampler` becomes a copy of `model` at every step that is a multiple of stale + 1. A KL penalty
  // or a preference objective ties `model` to `reference`, which is not used otherwise.
  RlTrainer(Transformer& model, Transformer& sampler, Transformer& reference,
            const Tokenizer& tokenizer, const std::vector<Question>& questions, Grader& grader,
            const RlOptions& options);

  RlStep step(int64_t step);
  torch::optim::AdamW& optimizer() { return optimizer_; }

 private:
  std::vector<const Question*> questions_of(int64_t step) const;
  std::vector<Group> sample_groups(int64_t step, RlStep& result);
  void record_logps(std::vector<Minibatch>& minibatches);
  void update(const Minibatch& minibatch, RlStep& result);
  at::Tensor loss(const MicroBatch& batch, const Minibatch& minibatch,
                  const CompletionOutput& current, RlStep& result) const;

  Transformer& model_;
  Transformer& sampler_;
  Transformer& reference_;
  const Tokenizer& tokenizer_;
  const std::vector<Question>& questions_;
  Grader& grader_;
  RlOptions options_;
  torch::optim::AdamW optimizer_;
};

}  // namespace text2sql
