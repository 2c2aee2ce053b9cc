#include "rl/kernels/policy_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/sum.h"
#include "rl/kernels/gated_mask.h"
#include "rl/kernels/level_block.h"
#include "rl/kernels/metric_sums.h"
#include "rl/kernels/penalty_block.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/token_block.h"
#include "rl/kernels/token_rows.h"
#include "rl/kernels/weight_block.h"

namespace tether {
namespace {

// What every row of the call shares.
struct Call {
  const PolicyArrays& batch;  // under its gated mask
  const PolicyObjective& objective;
  std::vector<TokenWeight> weights;  // those that stay
  const PolicyGradients& gradients;
  StepCounts counts;
  double factor;     // of the whole loss
  TermCounts local;  // of this batch
};

// Zeros for the formulas of a batch without a reference.
template <class T>
constexpr T kNoRefLogp[kBlock] = {};

template <class Array>
TETHER_INLINE void prefetch(const RowLayout& layout, const Array& array, const Place& place) {
  prefetch_block(layout, array, place.row, place.column, place.count);
}

// What the terms of one row share.
template <class T>
struct RowFactors {
  TokenFactors<T> token;
  RowRatio<T> ratio = {};  // above the level of tokens
  WeightStatistics<T> weights = {};

  // Of a penalty that the level's ratio weighs.
  T kl_weight() const {
    return tether::kl_weight(Constant<T>{ratio.log_ratio}, kWeightSaturation<T>).value;
  }
};

// The ratios of the tokens in the block, their surrogate and their penalty. Between the loops it
// asks for the next block, an array at a time: more at once would wait for one another.
template <class T>
void fill_terms(const Call& call, const Place& place, const RowFactors<T>& row,
                TokenBlock<T>& block) {
  const PolicyArrays& batch = call.batch;
  const PolicyObjective& objective = call.objective;
  const Place next = place.next(batch.layout);
  prefetch(batch.layout, batch.response_mask, next);
  prefetch(batch.layout, batch.logps, next);
  if (objective.level == RatioLevel::token) {
    fill_ratios(kSaturation<T>, block);
  } else {
    fill_ratios(row.ratio, block);
  }
  prefetch(batch.layout, old_logps_of(batch), next);
  prefetch(batch.layout, call.gradients.logps, place);
  const T* logp = shares_ratio(objective.level) ? block.level_logp : block.logp;
  const T* ref_logp = batch.ref_logps ? block.ref_logp : kNoRefLogp<T>;
  objective.surrogate(TokenColumns<T>{logp, block.log_ratio, block.ratio, block.advantage,
                                      block.old_logp, ref_logp, block.size},
                      block.loss, block.dloss);
  prefetch(batch.layout, batch.advantages, next);
  prefetch(batch.layout, batch.ref_logps, next);
  if (objective.kl.beta > 0) fill_penalty(objective.kl, objective.level, row.kl_weight(), block);
}

// run<kPenalty, kWeighted>()
template <class Run>
void with_terms(bool penalty, bool weighted, Run run) {
  if (penalty) {
    weighted ? run.template operator()<true, true>() : run.template operator()<true, false>();
  } else {
    weighted ? run.template operator()<false, true>() : run.template operator()<false, false>();
  }
}

// Adds the tokens in the block to the sums and makes their gradient.
template <bool kBounded, class T>
void evaluate_block(const Call& call, const Place& place, const RowFactors<T>& row,
                    TokenBlock<T>& block, MetricSums& metrics) {
  if constexpr (kBounded)
    saturate(bool(call.batch.ref_logps), bool(call.batch.rollout_logps), block);
  fill_terms(call, place, row, block);
  const bool weighted = !call.weights.empty();
  if (weighted) {
    fill_weights(call.weights, row.weights, block);
    sum_token_weights(block, metrics);
  }
  with_terms(call.objective.kl.beta > 0, weighted, [&]<bool kPenalty, bool kWeighted>() {
    sum_block<kPenalty, kWeighted, kBounded>(row.token, block, metrics);
  });
  const RatioInterval inside = call.objective.surrogate.truncation();
  if (inside.low > 0 || inside.high < infinity) {
    sum_truncated(inside, row.token.share, block, metrics);
  }
}

// d L / d logp over w, for the levels of whole sequences (rl/level.h).
double level_scale(RatioLevel level, double n) {
  if (level == RatioLevel::sequence_sum) return 1;
  return n > 0 ? 1 / n : 0;
}

template <class T>
RowRatio<T> row_ratio(const Call& call, int64_t row, double n, TokenBlock<T>& block) {
  LaneSum logps, log_ratios;
  for_each_block(call.batch, row, block,
                 [&](const Place&) { sum_level(block, logps, log_ratios); });
  const double scale = level_scale(call.objective.level, n);
  return RowRatio<T>::of(scale * logps.total(), scale * log_ratios.total());
}

template <class T>
void store_gradient(const Call& call, const Place& place, const TokenBlock<T>& block) {
  store_block(call.batch.layout, call.gradients.logps, place.row, place.column, place.count,
              block.dlogp);
}

// What the tokens of a row with a shared ratio add up to: d S / d L, and rho G of a penalty that
// the same ratio weighs.
struct SharedSlopes {
  LaneSum surrogate;
  CompensatedSum kl;
};

// Where a ratio is shared, the gradient of a token has to wait for the slopes of all of them.
// `scale`: level_scale.
template <class T>
void store_shared_gradient(const Call& call, int64_t row, double scale,
                           const RowFactors<T>& factors, const SharedSlopes& slopes,
                           TokenBlock<T>& block) {
  const PolicyObjective& objective = call.objective;
  const T slope = narrow<T>(double(factors.token.loss) * scale * slopes.surrogate.total());
  for_each_block(call.batch, row, block, [&](const Place& place) {
    if (objective.kl.beta > 0) {
      fill_penalty(objective.kl, objective.level, factors.kl_weight(), block);
      if (shares_penalty(objective.kl, objective.level))
        add_shared_penalty(scale, slopes.kl, block);
      fill_shared_gradient<true>(slope, factors.token.kl, block);
    } else {
      fill_shared_gradient<false>(slope, T(0), block);
    }
    store_gradient(call, place, block);
  });
}

// Adds the entropies of the row to their metric, and writes their gradient, -factor w.
template <class T>
void row_entropy(const Call& call, int64_t row, T factor, TokenBlock<T>& block,
                 MetricSums& metrics) {
  const PolicyArrays& batch = call.batch;
  for (int64_t column = 0; column < batch.layout.length(row); column += kBlock) {
    const Place place = Place::at(batch.layout, row, column);
    const auto load = [&](const ConstArray& array, const T* weights, T* out) {
      load_block(batch.layout, array, row, column, place.count, weights, out);
    };
    block.size = whole_lanes(place.count);
    load(batch.response_mask, nullptr, block.weight);
    load(batch.entropies, block.weight, block.entropy);
    sum_entropies(factor, block, metrics);
    if (!call.gradients.entropies) continue;
    store_block(batch.layout, call.gradients.entropies, row, column, place.count, block.dentropy);
  }
}

// The loss of one row, its gradient written and its metrics added.
template <bool kBounded, class T>
double row_loss(const Call& call, int64_t row, TokenBlock<T>& block, MetricSums& metrics) {
  const PolicyObjective& objective = call.objective;
  const Aggregation& aggregation = objective.aggregation;
  const double beta = objective.kl.beta;
  const bool by_row = objective.level != RatioLevel::token;
  const bool needs_tokens =
      !is_per_token(objective) || aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
  const double n = needs_tokens ? row_tokens<T>(call.batch, row) : 0;
  const double loss_factor = call.factor * row_factor(aggregation, call.counts.policy, n);
  const double kl_factor = call.factor * beta * row_factor(aggregation, call.counts.kl, n);

  RowFactors<T> factors{{.loss = narrow<T>(loss_factor),
                         .kl = narrow<T>(kl_factor),
                         .share = narrow<T>(by_row && n > 0 ? 1 / n : 1)}};
  if (by_row) factors.ratio = row_ratio(call, row, n, block);
  factors.weights = row_statistics<kBounded>(call.batch, call.weights, row, n, block);
  const bool shared = shares_ratio(objective.level);
  SharedSlopes slopes;
  for_each_block(call.batch, row, block, [&](const Place& place) {
    evaluate_block<kBounded>(call, place, factors, block, metrics);
    if (!call.gradients.logps) return;
    if (!shared) return store_gradient(call, place, block);
    with_terms(beta > 0, !call.weights.empty(), [&]<bool kPenalty, bool kWeighted>() {
      sum_slopes<kPenalty, kWeighted, kBounded>(block, slopes.surrogate);
    });
    if (shares_penalty(objective.kl, objective.level)) sum_kl_of_gradient(block, slopes.kl);
  });
  if (shared && call.gradients.logps) {
    const double scale = level_scale(objective.level, n);
    store_shared_gradient(call, row, scale, factors, slopes, block);
  }
  const double entropy_factor = objective.entropy.coefficient * loss_factor;
  if (call.batch.entropies) row_entropy(call, row, narrow<T>(entropy_factor), block, metrics);
  const MetricSums::Row sums = metrics.take_row();
  double loss = loss_factor * sums.loss;
  if (beta > 0) loss += kl_factor * sums.kl;
  if (entropy_factor != 0) loss -= entropy_factor * sums.entropy;
  return loss;
}

template <bool kBounded, class T>
PartTotals chunk_loss(const Call& call, const Chunks& chunks, int64_t chunk) {
  TokenBlock<T> block;
  MetricSums metrics;
  double loss = 0;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    loss += row_loss<kBounded>(call, row, block, metrics);
  }
  return metrics.totals(loss);
}

template <class T>
PolicyTotals total_loss(const Call& call, const Executor& executor) {
  const RowLayout& layout = call.batch.layout;
  const Chunks chunks = Chunks::of(layout.rows, layout.elements());
  std::array<PartTotals, kMaxChunks> parts;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    PartTotals& part = parts[static_cast<size_t>(chunk)];
    part = chunk_loss<false, T>(call, chunks, chunk);
    // Inputs that are not finite, or finite ones of which something overflowed: once more, with
    // bounds that a fast loop does without.
    if (!part.is_sound()) part = chunk_loss<true, T>(call, chunks, chunk);
  });
  PolicyTotals out;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    add(parts[static_cast<size_t>(chunk)], out.loss, out.metrics);
  }
  const bool by_row = call.objective.level != RatioLevel::token;
  for (int i = 0; i < PolicyMetrics::kSums; ++i) {
    const bool sequences = by_row && PolicyMetrics::is_of_ratio(i);
    out.metrics.sums[2 * static_cast<size_t>(i) + 1] =
        sequences ? call.local.sequences : call.local.tokens;
  }
  if (call.weights.empty()) out.metrics.set_unweighted(call.local.tokens);
  return out;
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
  if (std::isnan(total.tokens)) check_weights(function, batch.layout, batch.response_mask);
  return total;
}

// Without what no weight looks at. (A surrogate may look at ref_logps.)
PolicyArrays arrays_read(const PolicyArrays& batch, const std::vector<TokenWeight>& weights) {
  PolicyArrays out = batch;
  bool by_rollout = false;
  for (const TokenWeight& weight : weights) {
    by_rollout |= weight.formula.traits().needs_rollout_logps;
  }
  if (!by_rollout) out.rollout_logps = {};
  return out;
}

}  // namespace

TermCounts checked_counts(std::string_view function, const PolicyArrays& batch,
                          const Executor& executor) {
  return batch.logps.dtype == DType::float64 ? count_tokens<double>(function, batch, executor)
                                             : count_tokens<float>(function, batch, executor);
}

PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const PolicyGradients& gradients,
                         const Executor& executor) {
  check_call("policy_loss", batch, objective, gradients);
  const GatedMask gated("policy_loss", batch, objective, executor);
  const std::vector<TokenWeight> weights = weights_that(false, objective.weights);
  const PolicyArrays read = arrays_read(gated.applied_to(batch), weights);
  const TermCounts local = checked_counts("policy_loss", read, executor);
  const Call call{read,
                  objective,
                  weights,
                  gradients,
                  step_counts("policy_loss", normalizer, local),
                  normalizer.factor(),
                  local};
  return batch.logps.dtype == DType::float64 ? total_loss<double>(call, executor)
                                             : total_loss<float>(call, executor);
}

Normalizer local_counts(const PolicyArrays& batch, const PolicyObjective& objective,
                        const Executor& executor) {
  const auto function = "local_counts";
  check_objective(function, objective);
  check_inputs(function, batch);
  check_weight_needs(function, presence_of(batch), weights_that(true, objective.weights));
  const GatedMask gated(function, batch, objective, executor);
  const TermCounts local = checked_counts(function, gated.applied_to(batch), executor);
  return {.policy = local.tokens, .kl = local.tokens, .sequences = local.sequences};
}

}  // namespace tether
