// What the layer of logits does for a small model: a training step of examples/text2sql, forward
// and backward of a policy loss with entropies, by the library and by torch's operations. Its
// vocabulary has 384 entries.

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include <string>

#include "bench/eager.h"
#include "examples/text2sql/model.h"
#include "libtorch/tether.h"

namespace tether::bench {
namespace {

constexpr int64_t kRows = 64, kTokens = 48;

void step(benchmark::State& state, bool eager) {
  text2sql::Transformer model({}, /*seed=*/1);
  at::manual_seed(2);
  const std::vector<int64_t> sizes = {kRows, kTokens};
  const at::Tensor ids = at::randint(model.options().vocabulary, sizes, at::kLong);
  const at::Tensor targets = at::randint(model.options().vocabulary, sizes, at::kLong);
  PolicyBatch batch{
      .logps = {}, .advantages = at::randn({kRows}), .response_mask = at::ones(sizes, at::kBool)};
  for (auto _ : state) {
    const at::Tensor logits = model.logits(model.rows(ids));
    const TokenLogps out =
        eager ? by_log_softmax(logits, targets) : token_logps(logits, targets, {.entropies = true});
    batch.logps = out.logps;
    model.zero_grad();
    (policy_loss(batch, presets::dapo()).loss - 0.01 * out.entropies.mean()).backward();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kTokens);
}

}  // namespace

void register_text2sql() {
  const std::string shape = std::to_string(kRows) + "x" + std::to_string(kTokens);
  const auto add = [&](const std::string& name, bool eager) {
    benchmark::RegisterBenchmark((shape + "/" + name + "/text2sql_step/float32").c_str(), step,
                                 eager);
  };
  add("autograd", false);
  add("eager", true);
}

}  // namespace tether::bench
