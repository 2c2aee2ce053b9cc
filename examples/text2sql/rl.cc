#include "examples/text2sql/rl.h"

#include <ATen/ATen.h>
#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <numeric>
#include <span>

#include "examples/text2sql/random.h"

namespace text2sql {
namespace {

double learning_rate(const RlOptions& options, int64_t step) {
  const double warmup =
      static_cast<double>(step + 1) / static_cast<double>(options.warmup_steps + 1);
  const double progress = static_cast<double>(step) / static_cast<double>(options.steps);
  return options.learning_rate * std::min(1.0, warmup) * (1 - (1 - options.final_share) * progress);
}

at::Tensor rewards_of(const std::vector<Answer>& answers) {
  std::vector<float> rewards;
  for (const Answer& answer : answers) rewards.push_back(answer.correct ? 1 : 0);
  return at::tensor(rewards);
}

// Of each group with unequal rewards the first of the best and the first of the worst samples.
void keep_best_and_worst(std::vector<Group>& groups) {
  std::erase_if(groups, [](const Group& group) { return !group.advantages.any().item<bool>(); });
  for (Group& group : groups) {
    const auto best = group.advantages.argmax().item<int64_t>();
    const auto worst = group.advantages.argmin().item<int64_t>();
    group.completions = {group.completions[static_cast<size_t>(best)],
                         group.completions[static_cast<size_t>(worst)]};
    group.rewards = at::tensor({1.0f, 0.0f});
    group.advantages = at::tensor({1.0f, -1.0f});
  }
}

}  // namespace

double RlStep::reward() const {
  const auto correct = std::count_if(answers.begin(), answers.end(),
                                     [](const Answer& answer) { return answer.correct; });
  return static_cast<double>(correct) / static_cast<double>(answers.size());
}

RlTrainer::RlTrainer(Transformer& model, Transformer& sampler, Transformer& reference,
                     const Tokenizer& tokenizer, const std::vector<Question>& questions,
                     Grader& grader, const RlOptions& options)
    : model_(model),
      sampler_(sampler),
      reference_(reference),
      tokenizer_(tokenizer),
      questions_(questions),
      grader_(grader),
      options_(options),
      optimizer_(
          model.parameters(),
          torch::optim::AdamWOptions(options.learning_rate).betas({0.9, 0.95}).weight_decay(0)) {}

RlStep RlTrainer::step(int64_t step) {
  optimizer_.param_groups()[0].options().set_lr(learning_rate(options_, step));
  if (step % (options_.stale + 1) == 0) copy_parameters(model_, sampler_);
  RlStep result;
  const std::vector<Group> groups = sample_groups(step, result);
  const auto count = static_cast<size_t>(options_.minibatches);
  std::vector<Minibatch> minibatches;
  for (size_t i = 0; i < count; ++i) {
    const size_t begin = groups.size() * i / count, end = groups.size() * (i + 1) / count;
    const auto members = std::span(groups).subspan(begin, end - begin);
    minibatches.push_back(
        make_minibatch({members.begin(), members.end()}, options_.objective.policy));
  }
  if (options_.objective.critic) {
    estimate_advantages(model_, minibatches, options_.objective.lambda);
  }
  record_logps(minibatches);
  for (const Minibatch& minibatch : minibatches) update(minibatch, result);
  result.entropy /= std::max(1.0, result.tokens);
  result.gradient_norm /= static_cast<double>(count);
  return result;
}

// Without replacement until all questions were seen.
std::vector<const Question*> RlTrainer::questions_of(int64_t step) const {
  const auto count = static_cast<int64_t>(questions_.size());
  std::vector<size_t> order(questions_.size());
  std::vector<const Question*> result;
  int64_t epoch = -1;
  for (int64_t i = step * options_.prompts; i < (step + 1) * options_.prompts; ++i) {
    if (i / count != epoch) {
      epoch = i / count;
      std::iota(order.begin(), order.end(), size_t{0});
      Random(Random::mix(options_.seed) + static_cast<uint64_t>(epoch)).shuffle(order);
    }
    result.push_back(&questions_[order[static_cast<size_t>(i % count)]]);
  }
  return result;
}

std::vector<Group> RlTrainer::sample_groups(int64_t step, RlStep& result) {
  const std::vector<const Question*> questions = questions_of(step);
  std::vector<Ids> prompts;
  for (const Question* question : questions) prompts.push_back(tokenizer_.prompt(question->text));
  const std::vector<Ids> completions =
      sample(sampler_, prompts,
             {.samples_per_prompt = options_.samples,
              .max_tokens = options_.max_tokens,
              .seed = Random::mix(options_.seed + 1) + static_cast<uint64_t>(step)});
  result.answers = grader_.grade(questions, completions, tokenizer_);
  const at::Tensor rewards = rewards_of(result.answers);
  // With a value head every sample has something to learn from: none is left out.
  const at::Tensor advantages =
      options_.objective.critic
          ? at::ones_like(rewards)
          : tether::group_advantage(rewards, options_.samples, options_.objective.advantage);

  std::vector<Group> groups;
  const auto samples = static_cast<size_t>(options_.samples);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto rows = std::span(completions).subspan(i * samples, samples);
    const auto first = static_cast<int64_t>(i * samples);
    groups.push_back({prompts[i],
                      {rows.begin(), rows.end()},
                      rewards.narrow(0, first, options_.samples),
                      advantages.narrow(0, first, options_.samples)});
  }
  if (options_.objective.preference) keep_best_and_worst(groups);
  return groups;
}

// The first minibatch is met by the policy of the step's beginning itself, and absent old_logps
// mean logps, detached; the later ones need theirs from before the first update.
void RlTrainer::record_logps(std::vector<Minibatch>& minibatches) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < minibatches.size(); ++i) {
    for (MicroBatch& batch : minibatches[i].parts) {
      if (i > 0) batch.old_logps = completion_logps(model_, batch).logps;
      if (options_.objective.has_reference()) {
        batch.ref_logps = completion_logps(reference_, batch).logps;
      }
      if (options_.objective.has_rollout()) {
        batch.rollout_logps = completion_logps(sampler_, batch).logps;
      }
    }
  }
}

at::Tensor RlTrainer::loss(const MicroBatch& batch, const Minibatch& minibatch,
                           const CompletionOutput& current, RlStep& result) const {
  const at::Tensor& logps = current.tokens.logps;
  if (options_.objective.preference) {
    const PairOrder pairs = chosen_first(batch.offsets);
    const tether::PreferenceOutput output =
        tether::preference_loss({.logps = logps.index_select(0, pairs.tokens),
                                 .ref_logps = batch.ref_logps.index_select(0, pairs.tokens),
                                 .response_mask = batch.response_mask,
                                 .offsets = pairs.offsets},
                                *options_.objective.preference, minibatch.pairs);
    result.preference.merge(output.metrics.to_host());
    return output.loss;
  }
  const tether::LossOutput output =
      tether::policy_loss({.logps = logps,
                           .advantages = batch.advantages,
                           .response_mask = batch.response_mask,
                           .old_logps = batch.old_logps,
                           .ref_logps = batch.ref_logps,
                           .rollout_logps = batch.rollout_logps,
                           .offsets = batch.offsets},
                          options_.objective.policy, minibatch.counts);
  result.metrics.merge(output.metrics.to_host());
  if (!options_.objective.critic) return output.loss;
  const tether::ValueOutput value = tether::value_loss({.values = current.values,
                                                        .returns = batch.returns,
                                                        .response_mask = batch.response_mask,
                                                        .old_values = batch.old_values,
                                                        .offsets = batch.offsets},
                                                       {}, minibatch.counts);
  result.values.merge(value.metrics.to_host());
  return output.loss + options_.objective.value_weight * value.loss;
}

void RlTrainer::update(const Minibatch& minibatch, RlStep& result) {
  if (minibatch.parts.empty()) return;  // every group had equal rewards: nothing to learn from
  optimizer_.zero_grad();
  for (const MicroBatch& batch : minibatch.parts) {
    const CompletionOutput current = evaluate(model_, batch);
    loss(batch, minibatch, current, result).backward();
    result.tokens += static_cast<double>(batch.targets.numel());
    result.entropy += current.tokens.entropies.sum().item<double>();
  }
  result.gradient_norm +=
      torch::nn::utils::clip_grad_norm_(model_.parameters(), options_.max_gradient_norm);
  optimizer_.step();
}

}  // namespace text2sql
