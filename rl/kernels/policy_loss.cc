#include "rl/kernels/policy_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "core/sum.h"
#include "rl/kernels/block_sums.h"

namespace tether {
namespace {

template <class T>
struct Block {
  alignas(64) T weight[kBlock];
  alignas(64) T logp[kBlock];
  alignas(64) T old_logp[kBlock];
  alignas(64) T ref_logp[kBlock];
  alignas(64) T advantage[kBlock];
  alignas(64) T log_ratio[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T dloss[kBlock];
  alignas(64) T kl[kBlock];
  alignas(64) T dkl[kBlock];
  alignas(64) T dlogp[kBlock];
};

constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class T>
TETHER_CLONES void subtract(const T* a, const T* b, int size, T* out) {
  size = size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) out[i] = a[i] - b[i];  // VECTOR
}

template <class T>
TETHER_CLONES void kl_penalty(const T* logp, const T* ref_logp, int size, T* kl, T* dkl) {
  size = size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const Dual<T> penalty = k3(Constant<T>{ref_logp[i]} - Dual<T>{logp[i], T(1)});
    kl[i] = penalty.value;
    dkl[i] = penalty.grad;
  }
}

// A slot of weight 0 gets exactly 0, whatever a formula made of its zeros.
template <class T>
TETHER_CLONES void weigh(const T* weight, const T* dloss, const T* dkl, T loss_factor, T kl_factor,
                         int size, T* dlogp) {
  size = size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T gradient = weight[i] * (loss_factor * dloss[i] + kl_factor * dkl[i]);
    dlogp[i] = weight[i] != T(0) ? gradient : T(0);
  }
}

template <class T>
void fill(T value, int size, T* out) {
  for (int i = 0; i < size; ++i) out[i] = value;
}

// What every row of the call shares.
struct Call {
  const PolicyArrays& batch;
  const PolicyObjective& objective;
  const MutableArray& dlogps;
  StepCounts counts;
  double world_size;
};

template <class T>
void load_tokens(const Call& call, int64_t row, int64_t column, int count, Block<T>& block) {
  const PolicyArrays& batch = call.batch;
  const auto load = [&](const ConstArray& array, T* out) {
    load_block(batch.layout, array, row, column, count, block.weight, out);
  };
  load_block<T>(batch.layout, batch.response_mask, row, column, count, nullptr, block.weight);
  load(batch.logps, block.logp);
  load(batch.advantages, block.advantage);
  load(batch.old_logps ? batch.old_logps : batch.logps, block.old_logp);
  if (batch.ref_logps) {
    load(batch.ref_logps, block.ref_logp);
  } else {
    fill(T(0), padded(count), block.ref_logp);
  }
}

template <class T>
double row_tokens(const PolicyArrays& batch, int64_t row) {
  alignas(64) T weight[kBlock];
  LaneSum tokens;
  const int64_t length = batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<T>(batch.layout, batch.response_mask, row, column, count, nullptr, weight);
    check_weights(padded(count), weight);
    add_lanes<T>(weight, padded(count), tokens.lane);
  }
  return tokens.total();
}

// The loss of one row, its gradient written and its metrics added.
template <class T>
double row_loss(const Call& call, int64_t row, Block<T>& block, MetricSums& metrics) {
  const bool penalty = call.objective.kl.beta > 0;
  const Aggregation& aggregation = call.objective.aggregation;
  const bool needs_row_tokens = aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
  const double n = needs_row_tokens ? row_tokens<T>(call.batch, row) : 0;
  const double loss_factor = call.world_size * row_factor(aggregation, call.counts.policy, n);
  const double kl_factor =
      call.world_size * call.objective.kl.beta * row_factor(aggregation, call.counts.kl, n);

  const int64_t length = call.batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    const int size = padded(count);
    load_tokens(call, row, column, count, block);
    subtract(block.logp, block.old_logp, size, block.log_ratio);
    call.objective.surrogate(TokenColumns<T>{block.logp, block.log_ratio, block.advantage,
                                             block.old_logp, block.ref_logp, size},
                             block.loss, block.dloss);
    if (penalty) {
      kl_penalty(block.logp, block.ref_logp, size, block.kl, block.dkl);
    } else {
      fill(T(0), size, block.kl);
      fill(T(0), size, block.dkl);
    }
    metrics.add(
        MetricInputs<T>{block.weight, block.logp, block.old_logp, block.ref_logp, block.advantage,
                        block.log_ratio, block.loss, block.dloss, block.kl},
        size);
    if (call.dlogps) {
      weigh(block.weight, block.dloss, block.dkl, T(loss_factor), T(kl_factor), size, block.dlogp);
      store_block(call.batch.layout, call.dlogps, row, column, count, block.dlogp);
    }
  }
  const MetricSums::Row sums = metrics.take_row();
  return loss_factor * sums.loss + (penalty ? kl_factor * sums.kl : 0);
}

template <class T>
PolicyTotals total_loss(const Call& call, const Executor& executor) {
  const RowLayout& layout = call.batch.layout;
  const Chunks chunks = Chunks::of(layout.rows, layout.elements());
  std::array<double, kMaxChunks> losses;
  std::array<PolicyMetrics, kMaxChunks> metrics;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    Block<T> block;
    MetricSums sums;
    double loss = 0;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      loss += row_loss(call, row, block, sums);
    }
    losses[static_cast<size_t>(chunk)] = loss;
    metrics[static_cast<size_t>(chunk)] = sums.metrics();
  });
  PolicyTotals out;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    out.loss += losses[static_cast<size_t>(chunk)];
    out.metrics.merge(metrics[static_cast<size_t>(chunk)]);
  }
  return out;
}

// Throws for the first weight outside [0, 1].
[[noreturn]] void report_weight(std::string_view function, const PolicyArrays& batch) {
  const auto where = [&](int64_t row, int64_t column) {
    if (!batch.layout.packed()) return "[" + text(row) + ", " + text(column) + "]";
    return "[" + text(batch.layout.offset(row) + column) + "]";
  };
  for (int64_t row = 0; row < batch.layout.rows; ++row) {
    for (int64_t column = 0; column < batch.layout.length(row); ++column) {
      double weight[kLanes];
      load_block<double>(batch.layout, batch.response_mask, row, column, 1, nullptr, weight);
      if (weight[0] >= 0 && weight[0] <= 1) continue;
      throw Error(std::string(function) + ": response_mask must be in [0, 1], got " +
                  text(weight[0]) + " at " + where(row, column));
    }
  }
  throw Error(std::string(function) + ": response_mask must not change during the call");
}

void check_offsets(std::string_view function, const RowLayout& layout) {
  for (int64_t row = 0; layout.packed() && row < layout.rows; ++row) {
    require(layout.length(row) >= 0, [&] {
      return std::string(function) + ": offsets must not decrease, got " +
             text(layout.offset(row + 1)) + " after " + text(layout.offset(row)) + " at [" +
             text(row + 1) + "]";
    });
  }
}

template <class T>
TermCounts count_tokens(std::string_view function, const PolicyArrays& batch,
                        const Executor& executor) {
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  std::array<TermCounts, kMaxChunks> counts;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TermCounts local;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const double tokens = row_tokens<T>(batch, row);
      local.tokens += tokens;
      local.sequences += tokens > 0 ? 1 : 0;
    }
    counts[static_cast<size_t>(chunk)] = local;
  });
  TermCounts total;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    total.tokens += counts[static_cast<size_t>(chunk)].tokens;
    total.sequences += counts[static_cast<size_t>(chunk)].sequences;
  }
  if (std::isnan(total.tokens)) report_weight(function, batch);
  return total;
}

TermCounts checked_counts(std::string_view function, const PolicyArrays& batch,
                          const PolicyObjective& objective, const Executor& executor) {
  check_objective(function, objective);
  check_offsets(function, batch.layout);
  return batch.logps.dtype == DType::float64 ? count_tokens<double>(function, batch, executor)
                                             : count_tokens<float>(function, batch, executor);
}

}  // namespace

PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const MutableArray& dlogps,
                         const Executor& executor) {
  const TermCounts local = checked_counts("policy_loss", batch, objective, executor);
  require(objective.kl.beta == 0 || bool(batch.ref_logps), [&] {
    return "policy_loss: ref_logps must be given when beta is greater than 0, got beta " +
           text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0";
  });
  const Call call{batch, objective, dlogps, step_counts("policy_loss", normalizer, local),
                  normalizer.world_size};
  return batch.logps.dtype == DType::float64 ? total_loss<double>(call, executor)
                                             : total_loss<float>(call, executor);
}

Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor) {
  const TermCounts local = checked_counts("local_counts", batch, objective, executor);
  return {.policy = local.tokens, .kl = local.tokens, .sequences = local.sequences};
}

}  // namespace tether
