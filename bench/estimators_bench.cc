// Estimators: the recursions and groups of a whole step.
//
//   raw      the library on raw memory, one thread
//   eager    the same recursion in torch's operations, a column of all rows at a time

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan.h"

namespace tether::bench {
namespace {

constexpr int64_t kRows = 256, kColumns = 2048;

struct Step {
  at::Tensor rewards, values, log_ratios, mask, mask_as_float, advantages, returns;
};

const Step& step() {
  static const Step made = [] {
    at::manual_seed(2);
    const std::vector<int64_t> sizes{kRows, kColumns};
    Step out;
    out.rewards = at::randn(sizes);
    out.values = at::randn(sizes);
    out.log_ratios = 0.1 * at::randn(sizes);
    out.mask = at::rand(sizes) > 0.1;
    out.mask_as_float = out.mask.to(at::kFloat);
    out.advantages = at::empty(sizes);
    out.returns = at::empty(sizes);
    return out;
  }();
  return made;
}

void recursion_raw(benchmark::State& state, const Recursion& recursion) {
  const Step& in = step();
  const auto array = [](const at::Tensor& tensor, DType type) {
    return ConstArray{tensor.const_data_ptr(), type, kColumns, 1};
  };
  const AdvantageArrays arrays{.layout = {.rows = kRows, .columns = kColumns},
                               .rewards = array(in.rewards, DType::float32),
                               .values = array(in.values, DType::float32),
                               .response_mask = array(in.mask, DType::boolean),
                               .log_ratios = array(in.log_ratios, DType::float32)};
  const MutableArray advantages{in.advantages.data_ptr(), DType::float32, kColumns, 1};
  const MutableArray returns{in.returns.data_ptr(), DType::float32, kColumns, 1};
  for (auto _ : state) {
    scan_rows("advantage", arrays, recursion, advantages, returns);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kColumns);
}

// As trainers write it (verl's, with carry over masked slots).
void gae_eager(benchmark::State& state) {
  const Step& in = step();
  for (auto _ : state) {
    at::Tensor next_value = at::zeros({kRows}), last = at::zeros({kRows});
    std::vector<at::Tensor> columns(kColumns);
    for (int64_t t = kColumns - 1; t >= 0; --t) {
      const at::Tensor mask = in.mask_as_float.select(1, t), value = in.values.select(1, t);
      const at::Tensor delta = in.rewards.select(1, t) + 0.99 * next_value - value;
      const at::Tensor advantage = delta + 0.99 * 0.95 * last;
      next_value = mask * value + (1 - mask) * next_value;
      last = mask * advantage + (1 - mask) * last;
      columns[static_cast<size_t>(t)] = last;
    }
    const at::Tensor advantages = at::stack(columns, 1);
    benchmark::DoNotOptimize((advantages + in.values).data_ptr());
  }
  state.SetItemsProcessed(state.iterations() * kRows * kColumns);
}

constexpr int64_t kGroups = 8192, kSize = 16;

void group_raw(benchmark::State& state) {
  at::manual_seed(3);
  const at::Tensor rewards = at::randn({kGroups * kSize});
  const at::Tensor advantages = at::empty_like(rewards);
  for (auto _ : state) {
    group_advantage(rewards.const_data_ptr<float>(), rewards.numel(), kSize, GroupAdvantage{},
                    advantages.data_ptr<float>());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * rewards.numel());
}

void group_eager(benchmark::State& state) {
  at::manual_seed(3);
  const at::Tensor rewards = at::randn({kGroups, kSize});
  for (auto _ : state) {
    const at::Tensor centred = rewards - rewards.mean(1, true);
    benchmark::DoNotOptimize((centred / (rewards.std(1, true, true) + 1e-6)).data_ptr());
  }
  state.SetItemsProcessed(state.iterations() * rewards.numel());
}

}  // namespace

void register_estimators() {
  for_each_recursion([](const auto& row) {
    const Recursion recursion = row.defaults;
    benchmark::RegisterBenchmark(("256x2048/raw/" + std::string(row.name) + "/float32").c_str(),
                                 [=](benchmark::State& state) { recursion_raw(state, recursion); });
  });
  benchmark::RegisterBenchmark("256x2048/eager/gae/float32", gae_eager);
  benchmark::RegisterBenchmark("8192x16/raw/group_advantage/float32", group_raw);
  benchmark::RegisterBenchmark("8192x16/eager/group_advantage/float32", group_eager);
}

}  // namespace tether::bench
