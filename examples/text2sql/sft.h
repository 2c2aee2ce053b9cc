#pragma once

#include <torch/optim/adamw.h>

#include <cstdint>
#include <vector>

#include "examples/text2sql/questions.h"
#include "examples/text2sql/sampler.h"
#include "examples/text2sql/tokenizer.h"

namespace text2sql {

struct SftOptions {
  int64_t steps = 1000;
  int64_t batch = 32;
  double learning_rate = 3e-3;  // after the warm-up; a cosine leads down to `final_share` of it
  double final_share = 0.05;
  int64_t warmup_steps = 20;
  double weight_decay = 0.05;
  double max_gradient_norm = 1;
  uint64_t seed = 0;
};

struct Example {
  Ids tokens;  // <bos> question <sql> query <eos>
  int64_t prompt_length = 0;
};

std::vector<Example> logged_examples(const std::vector<Question>& log, const Tokenizer& tokenizer);

// Supervised fine-tuning on the query log: the mean of -log p over the tokens of the queries.
// What step k does depends on the weights, the optimizer's state, the options and k, and on nothing
// else; so a checkpoint needs no state of a random number generator.
class SftTrainer {
 public:
  SftTrainer(Transformer& model, const std::vector<Example>& examples, const SftOptions& options);

  double step(int64_t step);  // returns the loss
  torch::optim::AdamW& optimizer() { return optimizer_; }

 private:
  std::vector<const Example*> batch(int64_t step);
  void shuffle(int64_t epoch);

  Transformer& model_;
  const std::vector<Example>& examples_;
  SftOptions options_;
  torch::optim::AdamW optimizer_;
  int64_t epoch_ = -1;
  std::vector<size_t> order_;  // of the epoch; neighbours in a batch have similar lengths
};

}  // namespace text2sql
