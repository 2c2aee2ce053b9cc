// The layer of logits: log-probabilities, entropies and their gradients, N x V, one thread.
//
//   raw       the library on raw memory
//   autograd  the library on tensors, forward and backward
//   eager     log_softmax, gather and entropy in torch's operations
//   support   over so many kept ids of each row, beside the whole rows of logits_forward, _both ...
//   gemm      the three matrix products of a linear layer alone, beside the losses fused into them

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "bench/eager.h"
#include "bench/stream.h"
#include "libtorch/logits_rows.h"
#include "libtorch/tether.h"
#include "logits/pair_kl.h"
#include "logits/rows.h"
#include "logits/support.h"

namespace tether::bench {
namespace {

struct Shape {
  int64_t rows, vocabulary;
  at::ScalarType type;
  double deviation = 3;  // of the logits

  auto operator<=>(const Shape&) const = default;
};

struct Tensors {
  at::Tensor logits, other, gradient, targets, old_logps, advantages;
};

const Tensors& tensors(const Shape& shape) {
  static std::map<Shape, Tensors> made;
  if (made.count(shape) == 0) {
    at::manual_seed(4);
    Tensors out;
    out.logits = (at::randn({shape.rows, shape.vocabulary}) * shape.deviation).to(shape.type);
    out.other = out.logits + at::randn({shape.rows, 1}).to(shape.type);
    out.gradient = at::zeros_like(out.logits);
    out.targets = at::randint(shape.vocabulary, {shape.rows}, at::kLong);
    out.old_logps = token_logps(out.logits, out.targets).logps.to(at::kDouble) +
                    0.1 * at::randn({shape.rows}, at::kDouble);
    out.advantages = at::randn({shape.rows}, at::kDouble);
    made[shape] = out;
  }
  return made[shape];
}

DType dtype_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? DType::bfloat16 : DType::float32;
}
ConstLogits view(const at::Tensor& logits) {
  return {logits.const_data_ptr(), dtype_of(logits), logits.size(0), logits.size(1),
          logits.size(1)};
}
MutableLogits writable(const at::Tensor& logits) {
  return {logits.mutable_data_ptr(), dtype_of(logits), logits.size(0), logits.size(1),
          logits.size(1)};
}

// passes: how often all logits cross the memory bus, as reads or writes.
void count(benchmark::State& state, const at::Tensor& logits, int passes) {
  state.SetItemsProcessed(state.iterations() * logits.numel());
  state.SetBytesProcessed(state.iterations() * logits.numel() * int64_t(logits.element_size()) *
                          passes);
}

// ---- raw ----------------------------------------------------------------------------------------

void forward(benchmark::State& state, const Shape& shape, RowSums sums) {
  const Tensors& in = tensors(shape);
  std::vector<RowStatistics> rows(size_t(shape.rows));
  for (auto _ : state) {
    row_statistics(view(in.logits), in.targets.const_data_ptr<int64_t>(), {.sums = sums},
                   rows.data());
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 1);
}

void backward(benchmark::State& state, const Shape& shape, bool in_place) {
  const Tensors& in = tensors(shape);
  const at::Tensor logits = in_place ? in.gradient.copy_(in.logits) : in.logits;
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  std::vector<RowStatistics> rows(size_t(shape.rows));
  row_statistics(view(logits), targets, {}, rows.data());
  const double* upstream = in.advantages.const_data_ptr<double>();
  for (auto _ : state) {
    row_gradients(view(logits), targets, {}, rows.data(), upstream, upstream,
                  writable(in.gradient));
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 2);
}

// Forward, the coefficient of PPO's clipped surrogate, backward, while the row is in the cache.
void row_loss(benchmark::State& state, const Shape& shape) {
  const Tensors& in = tensors(shape);
  struct Batch {
    const double *old_logps, *advantages;
  } batch{in.old_logps.const_data_ptr<double>(), in.advantages.const_data_ptr<double>()};
  const auto loss = [](void* argument, int64_t row, const RowStatistics& statistics) {
    const Batch& tokens = *static_cast<const Batch*>(argument);
    const double ratio = std::exp(logp(statistics, {}) - tokens.old_logps[row]);
    const double advantage = tokens.advantages[row];
    const bool clipped = advantage > 0 ? ratio > 1.2 : ratio < 0.8;
    return RowUpstream{clipped ? 0 : -ratio * advantage, -0.01};
  };
  for (auto _ : state) {
    row_losses(view(in.logits), in.targets.const_data_ptr<int64_t>(), {}, {loss, &batch},
               writable(in.gradient));
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 3);
}

void kl(benchmark::State& state, const Shape& shape) {
  const Tensors& in = tensors(shape);
  std::vector<KlStatistics> rows(size_t(shape.rows));
  for (auto _ : state) {
    logits_kl_statistics(view(in.logits), view(in.other), 1, nullptr, rows.data());
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 2);
}

// ---- kept ids -----------------------------------------------------------------------------------

// `size` ids of each row, its target among them.
Support kept_ids(const Shape& shape, int64_t size) {
  const at::Tensor targets = tensors(shape).targets;
  const int64_t step = shape.vocabulary / size;
  const at::Tensor ids = (targets.unsqueeze(-1) + step * at::arange(size)) % shape.vocabulary;
  return support(targets, ids);
}

void support_forward(benchmark::State& state, const Shape& shape, int64_t size) {
  const Tensors& in = tensors(shape);
  const Support kept = kept_ids(shape, size);
  std::vector<RowStatistics> rows(size_t(shape.rows));
  for (auto _ : state) {
    support_statistics(view(in.logits), in.targets.const_data_ptr<int64_t>(),
                       detail::kept_ids(kept.ids), {}, rows.data());
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 1);
}

void support_backward(benchmark::State& state, const Shape& shape, int64_t size) {
  const Tensors& in = tensors(shape);
  const Support kept = kept_ids(shape, size);
  const KeptIds ids = detail::kept_ids(kept.ids);
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  std::vector<RowStatistics> rows(size_t(shape.rows));
  support_statistics(view(in.logits), targets, ids, {}, rows.data());
  const double* upstream = in.advantages.const_data_ptr<double>();
  for (auto _ : state) {
    support_gradients(view(in.logits), targets, ids, {}, rows.data(), upstream, upstream,
                      writable(in.gradient));
    benchmark::ClobberMemory();
  }
  count(state, in.logits, 2);
}

enum class Way { autograd, in_place, eager };

void support_both(benchmark::State& state, const Shape& shape, int64_t size, Way way) {
  const Tensors& in = tensors(shape);
  const Support kept = kept_ids(shape, size);
  const at::Tensor leaf = in.logits.detach().requires_grad_();
  const at::Tensor weights = in.advantages.to(at::kFloat);
  for (auto _ : state) {
    TokenLogpsOptions options{.entropies = true};
    if (way == Way::in_place) options.gradient_buffer = in.gradient;
    const TokenLogps out = way == Way::eager ? by_log_softmax(kept.gather(leaf), kept.position)
                                             : token_logps(leaf, in.targets, options, kept);
    const at::Tensor loss = ((out.logps + 0.1 * out.entropies) * weights).sum();
    benchmark::DoNotOptimize(torch::autograd::grad({loss}, {leaf})[0].data_ptr());
  }
  count(state, in.logits, 3);
}

// ---- tensors ------------------------------------------------------------------------------------

void both_passes(benchmark::State& state, const Shape& shape, Way way) {
  const Tensors& in = tensors(shape);
  const at::Tensor leaf = in.logits.detach().requires_grad_();
  const at::Tensor weights = in.advantages.to(at::kFloat);
  for (auto _ : state) {
    TokenLogpsOptions options{.entropies = true};
    if (way == Way::in_place) options.gradient_buffer = in.gradient;
    const TokenLogps out = way == Way::eager ? by_log_softmax(leaf, in.targets)
                                             : token_logps(leaf, in.targets, options);
    const at::Tensor loss = ((out.logps + 0.1 * out.entropies) * weights).sum();
    benchmark::DoNotOptimize(torch::autograd::grad({loss}, {leaf})[0].data_ptr());
  }
  count(state, in.logits, 3);
}

void eager_forward(benchmark::State& state, const Shape& shape) {
  const Tensors& in = tensors(shape);
  for (auto _ : state) {
    benchmark::DoNotOptimize(by_log_softmax(in.logits, in.targets).entropies.data_ptr());
  }
  count(state, in.logits, 1);
}

void eager_kl(benchmark::State& state, const Shape& shape) {
  const Tensors& in = tensors(shape);
  for (auto _ : state) {
    const CategoricalKl out = detail::categorical_kl_any_device(in.logits, in.other, {});
    benchmark::DoNotOptimize(out.kl.data_ptr());
  }
  count(state, in.logits, 2);
}

// ---- the linear layer ---------------------------------------------------------------------------

struct LinearShape {
  int64_t rows, hidden, vocabulary;
  at::ScalarType type;
};

struct LinearTensors {
  at::Tensor hidden, weight, targets;
  PolicyBatch batch;
};

LinearTensors linear_tensors(const LinearShape& shape) {
  at::manual_seed(5);
  LinearTensors out;
  out.hidden = at::randn({1, shape.rows, shape.hidden}).to(shape.type).requires_grad_();
  out.weight = (at::randn({shape.vocabulary, shape.hidden}) * 0.05).to(shape.type).requires_grad_();
  out.targets = at::randint(shape.vocabulary, {1, shape.rows}, at::kLong);
  out.batch = {.logps = {},
               .advantages = at::randn({1, shape.rows}),
               .response_mask = at::ones({1, shape.rows}, at::kBool)};
  return out;
}

void products(benchmark::State& state, const LinearShape& shape) {
  const LinearTensors in = linear_tensors(shape);
  const at::Tensor hidden = in.hidden.detach()[0], weight = in.weight.detach();
  const at::Tensor logits = at::empty({shape.rows, shape.vocabulary}, hidden.options());
  at::Tensor out = logits, dhidden = at::empty_like(hidden), dweight = at::empty_like(weight);
  for (auto _ : state) {
    at::mm_out(out, hidden, weight.t());
    at::mm_out(dhidden, logits, weight);
    at::mm_out(dweight, logits.t(), hidden);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * shape.rows);
}

void linear_loss(benchmark::State& state, const LinearShape& shape, int64_t rows_a_chunk,
                 bool fused) {
  const LinearTensors in = linear_tensors(shape);
  const int64_t bytes = rows_a_chunk * shape.vocabulary * int64_t(in.weight.element_size());
  for (auto _ : state) {
    at::Tensor loss;
    if (fused) {
      loss = linear_policy_loss(in.hidden, {in.weight}, in.targets, in.batch, presets::ppo(), {},
                                {.chunk_bytes = bytes})
                 .loss;
    } else {
      PolicyBatch batch = in.batch;
      batch.logps = by_log_softmax(at::linear(in.hidden, in.weight), in.targets).logps;
      loss = policy_loss(batch, presets::ppo()).loss;
    }
    benchmark::DoNotOptimize(torch::autograd::grad({loss}, {in.hidden, in.weight})[0].data_ptr());
  }
  state.SetItemsProcessed(state.iterations() * shape.rows);
}

// ---- the machine --------------------------------------------------------------------------------

constexpr int64_t kWords = (int64_t{1} << 29) / 8;

void machine_in_place(benchmark::State& state) {
  std::vector<uint64_t> words(kWords);
  for (auto _ : state) {
    copy(words.data(), words.data(), kWords);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kWords * 16);
}

void machine_copy_past_caches(benchmark::State& state) {
  const std::vector<uint64_t> from(kWords);
  std::vector<uint64_t> to(kWords);
  for (auto _ : state) {
    copy_past_caches(from.data(), to.data(), kWords);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kWords * 16);
}

}  // namespace

void register_logits() {
  benchmark::RegisterBenchmark("machine/in_place", machine_in_place);
  benchmark::RegisterBenchmark("machine/copy_past_caches", machine_copy_past_caches);
  for (const Shape& shape : {Shape{512, 32000, at::kFloat}, Shape{512, 32000, at::kBFloat16},
                             Shape{512, 151936, at::kFloat}, Shape{512, 151936, at::kBFloat16}}) {
    const std::string size =
        std::to_string(shape.rows) + "x" + std::to_string(shape.vocabulary) + "/";
    const std::string type = shape.type == at::kFloat ? "/float32" : "/bfloat16";
    const auto add = [&](const std::string& name, auto function, auto... rest) {
      benchmark::RegisterBenchmark((size + name + type).c_str(), function, shape, rest...);
    };
    add("eager/logits_forward", eager_forward);
    add("eager/logits_both", both_passes, Way::eager);
    add("eager/logits_kl", eager_kl);
    add("raw/logits_forward", forward, RowSums::entropy);
    add("raw/logits_forward_logp", forward, RowSums::logp);
    add("raw/logits_forward_all", forward, RowSums::all);
    add("raw/logits_backward", backward, false);
    add("raw/logits_backward_in_place", backward, true);
    add("raw/logits_row_loss", row_loss);
    add("raw/logits_kl", kl);
    for (const int64_t ids : {20, 512}) {
      const std::string kept = std::to_string(ids);
      add("raw/support_forward_" + kept, support_forward, ids);
      add("raw/support_backward_" + kept, support_backward, ids);
      add("eager/support_both_" + kept, support_both, ids, Way::eager);
      add("autograd/support_both_" + kept, support_both, ids, Way::autograd);
      add("autograd/support_both_own_buffer_" + kept, support_both, ids, Way::in_place);
    }
    add("autograd/logits_both", both_passes, Way::autograd);
    add("autograd/logits_both_own_buffer", both_passes, Way::in_place);
  }
  // A tenth of the probabilities is below the smallest normal number.
  const Shape wide{512, 32000, at::kFloat, 16};
  benchmark::RegisterBenchmark("512x32000/raw/logits_forward_wide/float32", forward, wide,
                               RowSums::entropy);
  benchmark::RegisterBenchmark("512x32000/raw/logits_backward_wide/float32", backward, wide, false);
  benchmark::RegisterBenchmark("512x32000/raw/logits_kl_wide/float32", kl, wide);
  for (const LinearShape& shape : {LinearShape{1024, 1024, 32000, at::kFloat},
                                   LinearShape{1024, 1024, 32000, at::kBFloat16}}) {
    const std::string size = std::to_string(shape.rows) + "x" + std::to_string(shape.hidden) + "x" +
                             std::to_string(shape.vocabulary) + "/";
    const std::string type = shape.type == at::kFloat ? "/float32" : "/bfloat16";
    const auto add = [&](const std::string& name, auto function, auto... rest) {
      benchmark::RegisterBenchmark((size + name + type).c_str(), function, shape, rest...)
          ->Iterations(1)
          ->Repetitions(3);
    };
    add("gemm/logits_linear", products);
    add("eager/logits_linear", linear_loss, int64_t{0}, false);
    for (int64_t rows : {128, 256, 512, 1024}) {
      add("autograd/logits_linear_chunk_" + std::to_string(rows), linear_loss, rows, true);
    }
  }
}

}  // namespace tether::bench
