#include "examples/text2sql/sft.h"

#include <ATen/ATen.h>
#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <span>

#include "examples/text2sql/random.h"
#include "libtorch/tether.h"

namespace text2sql {
namespace {

// Batches are cut from pools of this many batches, sorted by length: little padding, and still
// different batches in every epoch.
constexpr int64_t kPoolBatches = 16;

double learning_rate(const SftOptions& options, int64_t step) {
  const double warmup =
      std::min(1.0, static_cast<double>(step + 1) /
                        static_cast<double>(std::max<int64_t>(1, options.warmup_steps)));
  const double progress = static_cast<double>(step) / static_cast<double>(options.steps);
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  return options.learning_rate * warmup *
         (options.final_share + (1 - options.final_share) * cosine);
}

}  // namespace

std::vector<Example> logged_examples(const std::vector<Question>& log, const Tokenizer& tokenizer) {
  std::vector<Example> examples;
  for (const Question& question : log) {
    Example example{.tokens = tokenizer.prompt(question.text)};
    example.prompt_length = static_cast<int64_t>(example.tokens.size());
    const Ids label = tokenizer.encode(question.logged_sql);
    example.tokens.insert(example.tokens.end(), label.begin(), label.end());
    example.tokens.push_back(Tokenizer::eos);
    examples.push_back(std::move(example));
  }
  return examples;
}

SftTrainer::SftTrainer(Transformer& model, const std::vector<Example>& examples,
                       const SftOptions& options)
    : model_(model),
      examples_(examples),
      options_(options),
      optimizer_(model.parameters(), torch::optim::AdamWOptions(options.learning_rate)
                                         .betas({0.9, 0.98})
                                         .weight_decay(options.weight_decay)) {}

double SftTrainer::step(int64_t step) {
  std::vector<Ids> rows;
  std::vector<int64_t> prompt_lengths;
  for (const Example* example : batch(step)) {
    rows.push_back(example->tokens);
    prompt_lengths.push_back(example->prompt_length);
  }
  const at::Tensor tokens = pad_right(rows);
  const tether::ResponseTargets response =
      tether::response_targets(tokens, at::tensor(prompt_lengths, at::kLong), attention_mask(rows));

  const at::Tensor hidden = model_.rows(tokens.narrow(1, 0, tokens.size(1) - 1));
  const at::Tensor at_response = response.response_mask.flatten().nonzero().squeeze(1);
  const at::Tensor logits = model_.logits(hidden.flatten(0, 1).index_select(0, at_response));
  const at::Tensor targets = response.targets.flatten().index_select(0, at_response);
  const at::Tensor loss = -tether::token_logps(logits, targets).logps.mean();

  optimizer_.param_groups()[0].options().set_lr(learning_rate(options_, step));
  optimizer_.zero_grad();
  loss.backward();
  torch::nn::utils::clip_grad_norm_(model_.parameters(), options_.max_gradient_norm);
  optimizer_.step();
  return loss.item<double>();
}

std::vector<const Example*> SftTrainer::batch(int64_t step) {
  const auto count = static_cast<int64_t>(examples_.size());
  const int64_t batches = std::max<int64_t>(1, count / options_.batch);
  if (step / batches != epoch_) shuffle(step / batches);
  const int64_t begin = step % batches * options_.batch;
  std::vector<const Example*> result;
  for (int64_t i = begin; i < std::min(begin + options_.batch, count); ++i) {
    result.push_back(&examples_[order_[static_cast<size_t>(i)]]);
  }
  return result;
}

void SftTrainer::shuffle(int64_t epoch) {
  epoch_ = epoch;
  Random random(Random::mix(options_.seed) + static_cast<uint64_t>(epoch));
  order_.resize(examples_.size());
  std::iota(order_.begin(), order_.end(), size_t{0});
  random.shuffle(order_);

  const auto batch = static_cast<size_t>(options_.batch);
  const size_t pool = batch * kPoolBatches;
  for (size_t begin = 0; begin < order_.size(); begin += pool) {
    const auto first = order_.begin() + static_cast<ptrdiff_t>(begin);
    const auto last =
        order_.begin() + static_cast<ptrdiff_t>(std::min(begin + pool, order_.size()));
    std::stable_sort(first, last, [&](size_t a, size_t b) {
      return examples_[a].tokens.size() < examples_[b].tokens.size();
    });
  }
  std::vector<size_t> batches(order_.size() / batch);
  std::iota(batches.begin(), batches.end(), size_t{0});
  random.shuffle(batches);
  std::vector<size_t> shuffled;
  for (const size_t b : batches) {
    const std::span<const size_t> members = std::span(order_).subspan(b * batch, batch);
    shuffled.insert(shuffled.end(), members.begin(), members.end());
  }
  if (!shuffled.empty()) order_ = std::move(shuffled);
}

}  // namespace text2sql
