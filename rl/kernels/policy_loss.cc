#include "rl/kernels/policy_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "core/sum.h"
#include "rl/kernels/metric_sums.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What every row of the call shares.
struct Call {
  const PolicyArrays& batch;
  const PolicyObjective& objective;
  const MutableArray& dlogps;
  StepCounts counts;
  double world_size;
  double tokens;  // of this batch
};

const ConstArray& old_logps_of(const PolicyArrays& batch) {
  return batch.old_logps ? batch.old_logps : batch.logps;
}

// Whether load_plain can read the batch.
template <class T>
bool is_plain(const PolicyArrays& batch) {
  constexpr DType kType = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const auto plain = [](const ConstArray& array, DType type) {
    return array.dtype == type && array.column_stride == 1 && !array.per_row;
  };
  return plain(batch.logps, kType) && plain(old_logps_of(batch), kType) &&
         plain(batch.advantages, kType);
}

template <class T>
PlainTokens<T> plain_tokens(const PolicyArrays& batch, int64_t row, int64_t column) {
  const auto at = [&](const ConstArray& array) {
    return static_cast<const T*>(array.data) + array.index(batch.layout, row, column);
  };
  return {at(batch.logps), at(old_logps_of(batch)), at(batch.advantages)};
}

template <class T>
void load_tokens(const PolicyArrays& batch, int64_t row, int64_t column, int count,
                 TokenBlock<T>& block) {
  const auto load = [&](const ConstArray& array, const T* weights, T* out) {
    load_block(batch.layout, array, row, column, count, weights, out);
  };
  block.size = padded(count);
  load(batch.response_mask, nullptr, block.weight);
  if (is_plain<T>(batch)) {
    load_plain(plain_tokens<T>(batch, row, column), count, block);
  } else {
    load(batch.logps, block.weight, block.logp);
    load(old_logps_of(batch), block.weight, block.old_logp);
    load(batch.advantages, block.weight, block.advantage);
  }
  if (batch.ref_logps) load(batch.ref_logps, block.weight, block.ref_logp);
}

// The number of true ones.
TETHER_CLONES int64_t count_true(const uint8_t* mask, int64_t size) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    int32_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += mask[i] != 0;  // VECTOR
    count += part;
  }
  return count;
}

template <class T>
double row_tokens(const PolicyArrays& batch, int64_t row) {
  const ConstArray& mask = batch.response_mask;
  const int64_t length = batch.layout.length(row);
  if (mask.dtype == DType::boolean && mask.column_stride == 1) {
    const auto* data = static_cast<const uint8_t*>(mask.data);
    return static_cast<double>(count_true(data + mask.index(batch.layout, row, 0), length));
  }
  alignas(64) T weight[kBlock];
  LaneSum tokens;
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<T>(batch.layout, mask, row, column, count, nullptr, weight);
    sum_weights(weight, padded(count), tokens);
  }
  return tokens.total();
}

// Zeros for the formulas of a batch without a reference.
template <class T>
constexpr T kNoRefLogp[kBlock] = {};

// Everything about the tokens in the block, given the factors of their row.
template <class T>
void evaluate_block(const Call& call, T loss_factor, T kl_factor, TokenBlock<T>& block,
                    MetricSums& metrics) {
  fill_ratios(kSaturation<T>, block);
  const T* ref_logp = call.batch.ref_logps ? block.ref_logp : kNoRefLogp<T>;
  call.objective.surrogate(TokenColumns<T>{block.logp, block.log_ratio, block.ratio,
                                           block.advantage, block.old_logp, ref_logp, block.size},
                           block.loss, block.dloss);
  if (call.objective.kl.beta > 0) {
    fill_penalty(block);
    sum_block<true>(loss_factor, kl_factor, block, metrics);
  } else {
    sum_block<false>(loss_factor, kl_factor, block, metrics);
  }
}

// The loss of one row, its gradient written and its metrics added.
template <class T>
double row_loss(const Call& call, int64_t row, TokenBlock<T>& block, MetricSums& metrics) {
  const Aggregation& aggregation = call.objective.aggregation;
  const double beta = call.objective.kl.beta;
  const bool needs_row_tokens = aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
  const double n = needs_row_tokens ? row_tokens<T>(call.batch, row) : 0;
  const double loss_factor = call.world_size * row_factor(aggregation, call.counts.policy, n);
  const double kl_factor = call.world_size * beta * row_factor(aggregation, call.counts.kl, n);

  const RowLayout& layout = call.batch.layout;
  const int64_t length = layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_tokens(call.batch, row, column, count, block);
    evaluate_block(call, T(loss_factor), T(kl_factor), block, metrics);
    if (call.dlogps) store_block(layout, call.dlogps, row, column, count, block.dlogp);
  }
  const MetricSums::Row sums = metrics.take_row();
  return loss_factor * sums.loss + (beta > 0 ? kl_factor * sums.kl : 0);
}

template <class T>
PolicyTotals total_loss(const Call& call, const Executor& executor) {
  const RowLayout& layout = call.batch.layout;
  const Chunks chunks = Chunks::of(layout.rows, layout.elements());
  std::array<PartTotals, kMaxChunks> parts;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TokenBlock<T> block;
    MetricSums metrics;
    double loss = 0;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      loss += row_loss(call, row, block, metrics);
    }
    parts[static_cast<size_t>(chunk)] = metrics.totals(loss);
  });
  PolicyTotals out;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    add(parts[static_cast<size_t>(chunk)], out.loss, out.metrics);
  }
  for (size_t i = 0; i < PolicyMetrics::kSums; ++i) out.metrics.sums[2 * i + 1] = call.tokens;
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

void check_arrays(const PolicyArrays& batch, const PolicyObjective& objective,
                  const MutableArray& dlogps) {
  const auto function = "policy_loss";
  check_given(function, "advantages", batch.layout, batch.advantages);
  check_array(function, "old_logps", batch.layout, batch.old_logps);
  check_array(function, "ref_logps", batch.layout, batch.ref_logps);
  check_array(function, "dlogps", batch.layout, dlogps);
  require(objective.kl.beta == 0 || bool(batch.ref_logps), [&] {
    return "policy_loss: ref_logps must be given when beta is greater than 0, got beta " +
           text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0";
  });
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
  check_given(function, "logps", batch.layout, batch.logps);
  check_given(function, "response_mask", batch.layout, batch.response_mask);
  return batch.logps.dtype == DType::float64 ? count_tokens<double>(function, batch, executor)
                                             : count_tokens<float>(function, batch, executor);
}

}  // namespace

PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const MutableArray& dlogps,
                         const Executor& executor) {
  const TermCounts local = checked_counts("policy_loss", batch, objective, executor);
  check_arrays(batch, objective, dlogps);
  const Call call{batch,
                  objective,
                  dlogps,
                  step_counts("policy_loss", normalizer, local),
                  normalizer.world_size,
                  local.tokens};
  return batch.logps.dtype == DType::float64 ? total_loss<double>(call, executor)
                                             : total_loss<float>(call, executor);
}

Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor) {
  const TermCounts local = checked_counts("local_counts", batch, objective, executor);
  return {.policy = local.tokens, .kl = local.tokens, .sequences = local.sequences};
}

}  // namespace tether
