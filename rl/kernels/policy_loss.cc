#include "rl/kernels/policy_loss.h"

#include <array>
#include <optional>
#include <vector>

#include "core/sum.h"
#include "rl/kernels/gated_mask.h"
#include "rl/kernels/level_block.h"
#include "rl/kernels/metric_sums.h"
#include "rl/kernels/penalty_block.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/token_block.h"
#include "rl/kernels/token_rows.h"
#include "rl/kernels/turns.h"
#include "rl/kernels/weight_block.h"

namespace tether {
namespace {

// What every row of the call shares.
struct Call {
  const PolicyArrays& batch;  // under its gated mask
  const PolicyObjective& objective;
  std::vector<TokenWeight> weights;  // those that stay
  TurnMarks turns;
  const PolicyGradients& gradients;
  StepCounts counts;
  double factor;  // of the whole loss
  double tokens;  // of this batch

  bool weighted() const { return !weights.empty() || batch.token_weights; }
  const LevelRule& level() const { return rule_of(objective.level); }
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
  RatioSegments<T>& segments;  // above the level of tokens
  WeightStatistics<T>& weights;
};

// Those of the segments in the block. A row has one: its first block has the columns of all.
template <class T>
void fill_shared_ratios(const Call& call, const Place& place, RatioSegments<T>& segments,
                        TokenBlock<T>& block) {
  if (call.level().segment == Segment::row && place.column > 0) return;
  for_each_part(segments, place, block.size, [&](const auto& segment, int begin, int end) {
    fill_ratios(segment.shared, begin, end, block);
  });
}

// The ratios of the tokens in the block, their surrogate and their penalty. Between the loops it
// asks for the next block, an array at a time: more at once would wait for one another.
template <bool kBounded, class T>
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
    fill_shared_ratios(call, place, row.segments, block);
    fill_ratio_weights(block);
  }
  if constexpr (kBounded) bound_advantages(block);
  prefetch(batch.layout, old_logps_of(batch), next);
  prefetch(batch.layout, call.gradients.logps, place);
  const T* logp = shares_ratio(objective.level) ? block.level_logp : block.logp;
  const T* ref_logp = batch.ref_logps ? block.ref_logp : kNoRefLogp<T>;
  objective.surrogate(TokenColumns<T>{logp, block.log_ratio, block.ratio, block.advantage,
                                      block.old_logp, ref_logp, block.size},
                      block.loss, block.dloss);
  prefetch(batch.layout, batch.advantages, next);
  prefetch(batch.layout, batch.ref_logps, next);
  if (objective.kl.beta > 0)
    fill_penalty(objective.kl, objective.level, bool(batch.kl_weights), block);
}

// run<first, second>()
template <class Run>
void with_terms(bool first, bool second, Run run) {
  if (first) {
    second ? run.template operator()<true, true>() : run.template operator()<true, false>();
  } else {
    second ? run.template operator()<false, true>() : run.template operator()<false, false>();
  }
}

// Adds the tokens in the block to the sums and makes their gradient.
template <bool kBounded, class T>
void evaluate_block(const Call& call, const Place& place, const RowFactors<T>& row,
                    TokenBlock<T>& block, MetricSums& metrics) {
  if constexpr (kBounded) saturate(call.batch, block);
  fill_terms<kBounded>(call, place, row, block);
  const bool weighted = call.weighted();
  if (weighted) {
    fill_weights(call.weights, place, row.weights, bool(call.batch.token_weights), block);
    sum_token_weights(block, metrics);
  }
  const bool by_token = call.level().segment == Segment::token;
  const T* ratio_weight = by_token ? block.weight : block.ratio_weight;
  with_terms(call.objective.kl.beta > 0, weighted, [&]<bool kPenalty, bool kWeighted>() {
    sum_block<kPenalty, kWeighted, kBounded>(row.token, ratio_weight, block, metrics);
  });
  const RatioInterval inside = call.objective.surrogate.truncation();
  const bool truncates = inside.low > 0 || inside.high < infinity;
  if (truncates && any_truncated(inside, block)) {
    sum_truncated(inside, ratio_weight, block, metrics);
  }
}

// Of a segment of n tokens d L / d logp is w over this (rl/level.h).
double level_count(const LevelRule& level, double n) { return level.is_mean && n > 0 ? n : 1; }

// The segments of a row of n tokens, with their ratios.
template <class T>
void find_segments(const Call& call, int64_t row, double n, TokenBlock<T>& block,
                   RatioSegments<T>& segments) {
  const LogRatioClip& clip = call.objective.log_ratio_clip;
  const bool clips = clips_log_ratios(call.objective);
  segments.assign(1, {});
  LaneSum logps, log_ratios;
  LevelColumns terms;
  TurnScan<T> turns(call.turns, call.batch.layout);
  for_each_block(call.batch, row, block, [&](const Place& place) {
    if (call.level().segment == Segment::row) {
      clips ? sum_level<true>(block, clip, logps, log_ratios)
            : sum_level<false>(block, clip, logps, log_ratios);
      return;
    }
    turns.for_each_begin(place, block.weight,
                         [&](int i) { segments.emplace_back().begin = place.column + i; });
    clips ? fill_level_terms<true>(block, clip, terms)
          : fill_level_terms<false>(block, clip, terms);
    for_each_part(segments, place, block.size, [&](RatioSegment<T>& turn, int begin, int end) {
      sum_terms(terms, begin, end, turn);
    });
  });
  if (call.level().segment == Segment::row) {
    segments[0].n = n;
    segments[0].logp = logps.total();
    segments[0].log_ratio = log_ratios.total();
  }
  const KlPenalty& penalty = call.objective.kl;
  std::optional<KlWeightBounds> bounds;
  if (of_level(penalty.correction)) {
    bounds = weight_bounds(kWeightSaturation<T>, penalty.ratio_high);
  }
  for (RatioSegment<T>& each : segments) {
    const double scale = 1 / level_count(call.level(), each.n);
    each.shared.set(scale * each.logp, scale * each.log_ratio, each.n, bounds);
  }
}

template <class T>
void store_gradient(const Call& call, const Place& place, const TokenBlock<T>& block) {
  store_block(call.batch.layout, call.gradients.logps, place.row, place.column, place.count,
              block.dlogp);
}

// Adds what the tokens in the block give the slopes of their segments; those of a whole row to
// `of_row`.
template <bool kBounded, class T>
void add_slopes(const Call& call, const Place& place, RatioSegments<T>& segments,
                TokenBlock<T>& block, LaneSum& of_row) {
  const KlPenalty& penalty = call.objective.kl;
  with_terms(penalty.beta > 0, call.weighted(), [&]<bool kPenalty, bool kWeighted>() {
    fill_slopes<kPenalty, kWeighted, kBounded>(block);
  });
  const bool by_row = call.level().segment == Segment::row;
  if (by_row) sum_slopes(block, of_row);
  const bool through_penalty = shares_penalty(penalty, call.objective.level);
  if (by_row && !through_penalty) return;
  for_each_part(segments, place, block.size, [&](RatioSegment<T>& each, int begin, int end) {
    if (!by_row) each.slope += sum_part(block.slope, begin, end);
    if (through_penalty) sum_kl_of_gradient(block, begin, end, each.kl);
  });
}

// Where a ratio is shared, the gradient of a token has to wait for the slopes of all of them.
template <class T>
void store_shared_gradient(const Call& call, int64_t row, const RowFactors<T>& factors,
                           TokenBlock<T>& block) {
  const PolicyObjective& objective = call.objective;
  const bool penalty = objective.kl.beta > 0, clips = clips_log_ratios(objective);
  for_each_block(call.batch, row, block, [&](const Place& place) {
    if (clips) fill_inside(objective.log_ratio_clip, block);
    if (penalty) {
      if (of_level(objective.kl.correction))
        fill_shared_ratios(call, place, factors.segments, block);
      fill_penalty(objective.kl, objective.level, bool(call.batch.kl_weights), block);
    }
    for_each_part(factors.segments, place, block.size, [&](auto& each, int begin, int end) {
      const double count = level_count(call.level(), each.n);
      const double slope = bounded(double(factors.token.loss) * bounded(each.slope / count));
      if (penalty && shares_penalty(objective.kl, objective.level))
        add_shared_penalty(count, each.kl, begin, end, block);
      const T kl_factor = factors.token.kl;
      if (is_beyond<T>(slope)) {
        fill_far_gradient(slope, clips, penalty, kl_factor, begin, end, block);
        return;
      }
      with_terms(penalty, clips, [&]<bool kPenalty, bool kClipped>() {
        fill_shared_gradient<kPenalty, kClipped>(T(slope), kl_factor, begin, end, block);
      });
    });
    store_gradient(call, place, block);
  });
}

// Adds the entropies of the row to their metric, and writes their gradient, -factor w e, e the
// caller's weights.
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
    if (batch.entropy_weights) {
      load(batch.entropy_weights, block.weight, block.given_entropy_weight);
      saturate_column(Largest<T>::kWeight, block.size, block.given_entropy_weight);
      saturate_column(Largest<T>::kInput, block.size, block.entropy);
    } else {
      std::fill_n(block.given_entropy_weight, block.size, T(1));
    }
    sum_entropies(factor, block, metrics);
    if (!call.gradients.entropies) continue;
    store_block(batch.layout, call.gradients.entropies, row, column, place.count, block.dentropy);
  }
}

// The loss of one row, its gradient written and its metrics added.
template <bool kBounded, class T>
double row_loss(const Call& call, int64_t row, RatioSegments<T>& segments,
                WeightStatistics<T>& weights, TokenBlock<T>& block, MetricSums& metrics) {
  const PolicyObjective& objective = call.objective;
  const Aggregation& aggregation = objective.aggregation;
  const double beta = objective.kl.beta;
  const bool needs_tokens =
      !is_per_token(objective) || aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
  const double n = needs_tokens ? row_tokens<T>(call.batch, row) : 0;
  const double length = length_of(call.batch, row, n);
  const double loss_factor =
      bounded(call.factor * row_factor(aggregation, call.counts.policy, length));
  const double kl_factor =
      bounded(bounded(call.factor * beta) * row_factor(aggregation, call.counts.kl, length));

  const RowFactors<T> factors{
      {.loss = narrow<T>(loss_factor), .kl = narrow<T>(kl_factor)}, segments, weights};
  if (call.level().segment != Segment::token) {
    find_segments(call, row, n, block, segments);
    for (const RatioSegment<T>& each : segments) metrics.segments += each.n > 0 ? 1 : 0;
  }
  find_statistics<kBounded>(call.batch, call.weights, call.turns, row, n, block, weights);
  const bool shared = shares_ratio(objective.level);
  LaneSum slopes;
  for_each_block(call.batch, row, block, [&](const Place& place) {
    evaluate_block<kBounded>(call, place, factors, block, metrics);
    if (!call.gradients.logps) return;
    if (!shared) return store_gradient(call, place, block);
    add_slopes<kBounded>(call, place, segments, block, slopes);
  });
  if (shared && call.gradients.logps) {
    if (call.level().segment == Segment::row) segments[0].slope = slopes.total();
    store_shared_gradient(call, row, factors, block);
  }
  const double entropy_factor = bounded(objective.entropy.coefficient * loss_factor);
  if (call.batch.entropies) row_entropy(call, row, narrow<T>(entropy_factor), block, metrics);
  const MetricSums::Row sums = metrics.take_row();
  double loss = bounded(loss_factor * sums.loss);
  if (beta > 0) loss += bounded(kl_factor * sums.kl);
  if (entropy_factor != 0) loss -= bounded(entropy_factor * sums.entropy);
  return bounded(loss);
}

template <bool kBounded, class T>
PartTotals chunk_loss(const Call& call, const Chunks& chunks, int64_t chunk) {
  TokenBlock<T> block;
  block.anchor_logp = logp_of(call.objective.kl.reference, block);
  RatioSegments<T> segments;
  WeightStatistics<T> weights;
  MetricSums metrics;
  double loss = 0;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    loss += row_loss<kBounded>(call, row, segments, weights, block, metrics);
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
  double segments = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const PartTotals& part = parts[static_cast<size_t>(chunk)];
    add(part, out.loss, out.metrics);
    segments += part.segments;
  }
  const bool by_token = call.level().segment == Segment::token;
  for (int i = 0; i < PolicyMetrics::kSums; ++i) {
    const bool by_segment = PolicyMetrics::is_of_ratio(i) && !by_token;
    out.metrics.sums[2 * static_cast<size_t>(i) + 1] = by_segment ? segments : call.tokens;
  }
  if (!call.weighted()) out.metrics.set_unweighted(call.tokens);
  return out;
}

// Without what neither weights nor penalty look at. (A surrogate may look at ref_logps.)
PolicyArrays arrays_read(const PolicyArrays& batch, const KlPenalty& penalty,
                         const std::vector<TokenWeight>& weights) {
  PolicyArrays out = batch;
  bool by_rollout = penalty.needs(KlReference::rollout);
  for (const TokenWeight& weight : weights) {
    by_rollout |= weight.formula.traits().needs_rollout_logps;
  }
  if (!by_rollout) out.rollout_logps = {};
  return out;
}

}  // namespace

PolicyTotals policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                         const Normalizer& normalizer, const PolicyGradients& gradients,
                         const Executor& executor) {
  check_call("policy_loss", batch, objective, gradients);
  const GatedMask gated("policy_loss", batch, objective, executor);
  const std::vector<TokenWeight> weights = weights_that(false, objective.weights);
  const PolicyArrays read = arrays_read(gated.applied_to(batch), objective.kl, weights);
  const TermCounts local = checked_counts("policy_loss", read, executor);
  const bool wide = batch.logps.dtype == DType::float64;
  TurnMarks turns{};
  if (rule_of(objective.level).segment == Segment::turn || any_of_turns(weights)) {
    turns = wide ? turn_marks<double>("policy_loss", batch, executor)
                 : turn_marks<float>("policy_loss", batch, executor);
  }
  const Call call{read,
                  objective,
                  weights,
                  turns,
                  gradients,
                  step_counts("policy_loss", normalizer, local, objective.aggregation),
                  bounded(normalizer.factor()),
                  local.tokens};
  return wide ? total_loss<double>(call, executor) : total_loss<float>(call, executor);
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
