// Token losses: the loss of a batch, its gradient and its metrics.
//
//   stream      moves the same bytes as the loss (bench/stream.h)
//   raw         tether::policy_loss on raw memory
//   autograd    tether::policy_loss on tensors, then loss.backward()
//   eager       PPO in torch's own operations, forward and backward

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "bench/eager.h"
#include "bench/stream.h"
#include "bench/user_surrogate.h"
#include "libtorch/tether.h"
#include "rl/kernels/policy_loss.h"

namespace tether::bench {
namespace {

struct Shape {
  int64_t rows, columns;
};
constexpr std::array kShapes{Shape{8, 16}, Shape{64, 1024}, Shape{512, 4096}};

// Tokens of a turn.
constexpr int64_t kTurn = 32;

struct Tensors {
  at::Tensor logps, old_logps, ref_logps, rollout_logps, advantages, row_advantages, response_mask,
      turn_ids, dlogps;
};

// A batch in the middle of an optimizer step: about a tenth of the tokens is clipped, a tenth is
// masked. Made once for each shape and type.
const Tensors& tensors(Shape shape, at::ScalarType type) {
  static std::map<std::tuple<int64_t, int64_t, at::ScalarType>, Tensors> made;
  Tensors& out = made[{shape.rows, shape.columns, type}];
  if (out.logps.defined()) return out;
  const std::vector<int64_t> sizes{shape.rows, shape.columns};
  at::manual_seed(1);
  const at::Tensor logps = at::randn(sizes) * 0.5 - 1;
  out.old_logps = (logps - at::randn(sizes) * 0.15).to(type);
  out.ref_logps = (logps + at::randn(sizes) * 0.3).to(type);
  out.rollout_logps = (logps + at::randn(sizes) * 0.3).to(type);
  out.advantages = at::randn(sizes).to(type);
  out.row_advantages = at::randn({shape.rows}).to(type);
  out.response_mask = at::rand(sizes) > 0.1;
  out.turn_ids = at::arange(shape.columns).div(kTurn, "floor").expand(sizes).contiguous();
  out.logps = logps.to(type);
  out.dlogps = at::empty_like(out.logps);
  return out;
}

ConstArray array(const at::Tensor& tensor) {
  const bool per_row = tensor.dim() == 1;
  DType type = DType::float32;
  if (tensor.scalar_type() == at::kBFloat16) type = DType::bfloat16;
  if (tensor.scalar_type() == at::kBool) type = DType::boolean;
  if (tensor.scalar_type() == at::kLong) type = DType::int64;
  return {tensor.const_data_ptr(), type, tensor.stride(0), per_row ? 0 : 1, per_row};
}

void count(benchmark::State& state, const Tensors& batch, bool reference) {
  const int64_t tokens = batch.logps.numel();
  const int64_t width = int64_t(batch.logps.element_size());
  state.SetItemsProcessed(state.iterations() * tokens);
  state.SetBytesProcessed(state.iterations() * tokens * ((reference ? 5 : 4) * width + 1));
}

void raw(benchmark::State& state, const PolicyObjective& objective, const Tensors& batch,
         const at::Tensor& advantages) {
  const bool reference = objective.kl.beta > 0;
  const PolicyArrays arrays{.layout = {.rows = batch.logps.size(0), .columns = batch.logps.size(1)},
                            .logps = array(batch.logps),
                            .advantages = array(advantages),
                            .response_mask = array(batch.response_mask),
                            .old_logps = array(batch.old_logps),
                            .ref_logps = reference ? array(batch.ref_logps) : ConstArray{},
                            .rollout_logps = array(batch.rollout_logps),
                            .turn_ids = array(batch.turn_ids)};
  const ConstArray like = array(batch.dlogps);
  const MutableArray dlogps{batch.dlogps.data_ptr(), like.dtype, like.row_stride};
  for (auto _ : state) {
    benchmark::DoNotOptimize(policy_loss(arrays, objective, {}, {.logps = dlogps}));
  }
  count(state, batch, reference);
}

void autograd(benchmark::State& state, const PolicyObjective& objective, const Tensors& batch) {
  const bool reference = objective.kl.beta > 0;
  at::Tensor logps = batch.logps.clone().requires_grad_(true);
  const PolicyBatch policy_batch{.logps = logps,
                                 .advantages = batch.advantages,
                                 .response_mask = batch.response_mask,
                                 .old_logps = batch.old_logps,
                                 .ref_logps = reference ? batch.ref_logps : at::Tensor()};
  for (auto _ : state) {
    logps.mutable_grad().reset();
    policy_loss(policy_batch, objective).loss.backward();
  }
  count(state, batch, reference);
}

void eager(benchmark::State& state, const Tensors& batch) {
  at::Tensor logps = batch.logps.clone().requires_grad_(true);
  for (auto _ : state) {
    logps.mutable_grad().reset();
    benchmark::DoNotOptimize(
        eager_ppo(logps, batch.old_logps, batch.advantages, batch.response_mask));
  }
  count(state, batch, false);
}

template <class Element>
void stream(benchmark::State& state, const Tensors& batch, bool reference) {
  const auto data = [](const at::Tensor& tensor) {
    return static_cast<const Element*>(tensor.const_data_ptr());
  };
  const TokenStream<Element> arrays{
      data(batch.logps),
      data(batch.old_logps),
      data(batch.advantages),
      reference ? data(batch.ref_logps) : nullptr,
      static_cast<const uint8_t*>(batch.response_mask.const_data_ptr()),
      static_cast<Element*>(batch.dlogps.data_ptr()),
      batch.logps.numel()};
  for (auto _ : state) {
    move(arrays);
    benchmark::ClobberMemory();
  }
  count(state, batch, reference);
}

std::string name(Shape shape, const std::string& row) {
  return std::to_string(shape.rows) + "x" + std::to_string(shape.columns) + "/" + row;
}

// tensors() is called when the benchmark runs, so that a filter makes only what it needs.
template <class Run>
void add(Shape shape, const std::string& row, Run run) {
  benchmark::RegisterBenchmark(name(shape, row).c_str(), run);
}

void add_objective(Shape shape, const std::string& objective_name, PolicyObjective (*preset)()) {
  const auto on = [=](at::ScalarType type, bool per_row) {
    return [=](benchmark::State& state) {
      const Tensors& batch = tensors(shape, type);
      raw(state, preset(), batch, per_row ? batch.row_advantages : batch.advantages);
    };
  };
  add(shape, "raw/" + objective_name + "/float32", on(at::kFloat, false));
  add(shape, "raw/" + objective_name + "/float32,advantages[B]", on(at::kFloat, true));
  add(shape, "raw/" + objective_name + "/bfloat16", on(at::kBFloat16, false));
  add(shape, "autograd/" + objective_name + "/float32",
      [=](benchmark::State& state) { autograd(state, preset(), tensors(shape, at::kFloat)); });
}

void add_weights(Shape shape) {
  for_each_weight([&](const auto& row) {
    for (const WeightLevel level : {WeightLevel::token, WeightLevel::sequence_sum}) {
      PolicyObjective objective = presets::ppo();
      objective.weights = {{row.defaults, level}};
      const std::string of = level == WeightLevel::token ? "" : " of sequences";
      add(shape, "raw/ppo, " + std::string(row.name) + of + "/float32",
          [=](benchmark::State& state) {
            const Tensors& batch = tensors(shape, at::kFloat);
            raw(state, objective, batch, batch.advantages);
          });
    }
  });
}

void add_levels(Shape shape) {
  for (size_t i = 0; i < kLevelRules.size(); ++i) {
    PolicyObjective objective = presets::ppo();
    objective.level = static_cast<RatioLevel>(i);
    add(shape, "raw/ppo, " + std::string(kLevelRules[i].name) + "/float32",
        [=](benchmark::State& state) {
          const Tensors& batch = tensors(shape, at::kFloat);
          raw(state, objective, batch, batch.advantages);
        });
  }
}

void add_stream(Shape shape, const std::string& row, bool reference) {
  add(shape, row + "/float32", [=](benchmark::State& state) {
    stream<uint32_t>(state, tensors(shape, at::kFloat), reference);
  });
  add(shape, row + "/bfloat16", [=](benchmark::State& state) {
    stream<uint16_t>(state, tensors(shape, at::kBFloat16), reference);
  });
}

}  // namespace

void register_token_losses() {
  for (const Shape shape : kShapes) {
    add_stream(shape, "stream", false);
    add_stream(shape, "stream_with_ref", true);
    for (const CatalogueRow& row : kCatalogue) {
      add_objective(shape, std::string(row.name), row.preset);
    }
    add_objective(shape, "user", user_objective);
    add_weights(shape);
    add_levels(shape);
    add(shape, "eager/ppo/float32",
        [=](benchmark::State& state) { eager(state, tensors(shape, at::kFloat)); });
  }
}

}  // namespace tether::bench
