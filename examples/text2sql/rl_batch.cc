#include "examples/text2sql/rl_batch.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "examples/text2sql/tokenizer.h"

namespace text2sql {
namespace {

// Tokens of a micro-batch, padding included: its activations stay in the cache of two cores.
constexpr size_t kMicroBatchTokens = 2048;

size_t longest(const Group& group) {
  size_t result = 0;
  for (const Ids& completion : group.completions) result = std::max(result, completion.size());
  return result;
}

MicroBatch micro_batch(const std::vector<Group>& groups) {
  std::vector<Ids> prompts, rows;
  std::vector<at::Tensor> rewards, advantages;
  std::vector<int64_t> offsets = {0};
  for (const Group& group : groups) {
    prompts.emplace_back(group.prompt.begin(), group.prompt.end() - 1);  // <sql> begins the rows
    rewards.push_back(group.rewards);
    advantages.push_back(group.advantages);
    for (const Ids& completion : group.completions) {
      Ids row = {Tokenizer::sql};
      row.insert(row.end(), completion.begin(), completion.end());
      offsets.push_back(offsets.back() + static_cast<int64_t>(completion.size()));
      rows.push_back(std::move(row));
    }
  }
  const at::Tensor tokens = pad_right(rows);
  const tether::ResponseTargets response =
      tether::response_targets(tokens, at::ones({tokens.size(0)}, at::kLong), attention_mask(rows));
  const at::Tensor at_response = response.response_mask.flatten().nonzero().squeeze(1);
  return {.prompts = pad_left(prompts),
          .prompt_lengths = lengths_of(prompts),
          .inputs = tokens.narrow(1, 0, tokens.size(1) - 1),
          .at_response = at_response,
          .targets = response.targets.flatten().index_select(0, at_response),
          .offsets = at::tensor(offsets, at::kLong),
          .response_mask = at::ones(offsets.back(), at::kBool),
          .rewards = at::cat(rewards),
          .advantages = at::cat(advantages)};
}

tether::Normalizer counts(const std::vector<Group>& groups,
                          const tether::PolicyObjective& objective) {
  const MicroBatch whole = micro_batch(groups);
  return tether::local_counts({.logps = at::zeros(whole.targets.sizes()),
                               .advantages = whole.advantages,
                               .response_mask = whole.response_mask,
                               .offsets = whole.offsets},
                              objective);
}

}  // namespace

Minibatch make_minibatch(std::vector<Group> groups, const tether::PolicyObjective& objective) {
  if (groups.empty()) return {};
  Minibatch result{.parts = {},
                   .counts = counts(groups, objective),
                   .pairs = {.pairs = double(groups.size()), .tokens = 0}};
  for (const Group& group : groups) *result.pairs.tokens += double(group.completions[0].size());
  if (objective.kl.beta == 0) {
    std::erase_if(groups, [](const Group& group) { return !group.advantages.any().item<bool>(); });
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return longest(a) < longest(b); });
  std::vector<Group> part;
  for (Group& group : groups) {
    const size_t rows = (part.size() + 1) * group.completions.size();
    if (!part.empty() && rows * longest(group) > kMicroBatchTokens) {
      result.parts.push_back(micro_batch(part));
      part.clear();
    }
    part.push_back(std::move(group));
  }
  if (!part.empty()) result.parts.push_back(micro_batch(part));
  return result;
}

PairOrder chosen_first(const at::Tensor& offsets) {
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  std::vector<int64_t> tokens, ends = {0};
  for (const int64_t side : {0, 1}) {
    for (int64_t row = side; row + 1 < offsets.size(0); row += 2) {
      for (int64_t i = at[row]; i < at[row + 1]; ++i) tokens.push_back(i);
      ends.push_back(static_cast<int64_t>(tokens.size()));
    }
  }
  return {at::tensor(tokens, at::kLong), at::tensor(ends, at::kLong)};
}

CompletionOutput evaluate(Transformer& model, const MicroBatch& batch) {
  const int64_t samples = batch.inputs.size(0) / batch.prompts.size(0);
  const Context context =
      model.read(batch.prompts, batch.prompt_lengths).repeat_interleave(samples);
  const at::Tensor hidden =
      model.extend(batch.inputs, context).flatten(0, 1).index_select(0, batch.at_response);
  return {tether::token_logps(model.logits(hidden), batch.targets, {.entropies = true}),
          model.values(hidden)};
}

tether::TokenLogps completion_logps(Transformer& model, const MicroBatch& batch) {
  return evaluate(model, batch).tokens;
}

void estimate_advantages(Transformer& model, std::vector<Minibatch>& step, double lambda) {
  const at::NoGradGuard no_grad;
  std::vector<MicroBatch*> parts;
  for (Minibatch& minibatch : step) {
    for (MicroBatch& batch : minibatch.parts) parts.push_back(&batch);
  }
  std::vector<at::Tensor> advantages;
  std::vector<int64_t> sizes;
  for (MicroBatch* batch : parts) {
    batch->old_values = evaluate(model, *batch).values;
    const at::Tensor last = batch->offsets.narrow(0, 1, batch->offsets.size(0) - 1) - 1;
    const at::Tensor rewards = at::zeros_like(batch->old_values).index_put_({last}, batch->rewards);
    const tether::AdvantagesAndReturns estimated =
        tether::generalized_advantage_estimation({.rewards = rewards,
                                                  .values = batch->old_values,
                                                  .response_mask = batch->response_mask,
                                                  .offsets = batch->offsets},
                                                 {.lambda = lambda});
    batch->returns = estimated.returns;
    advantages.push_back(estimated.advantages);
    sizes.push_back(advantages.back().numel());
  }
  if (parts.empty()) return;
  const at::Tensor all = at::cat(advantages);
  const at::Tensor mask = at::ones(all.sizes(), at::kBool);
  const std::vector<at::Tensor> whitened = tether::whiten(all, mask).split_with_sizes(sizes);
  for (size_t i = 0; i < parts.size(); ++i) parts[i]->advantages = whitened[i];
}

}  // namespace text2sql
