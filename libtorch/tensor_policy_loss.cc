#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "libtorch/arrays.h"
#include "libtorch/evaluators.h"
#include "libtorch/flat_batch.h"
#include "libtorch/policy_inputs.h"
#include "rl/kernels/token_block.h"

// policy_loss by torch's operations: the formulas on TensorNumber, every token of the batch side by
// side in one dimension, with the index of its row.

namespace tether::detail {
namespace {

// What the surrogate sees in place of the token's own logp and log-ratio (rl/level.h).
struct Levelled {
  at::Tensor logp, log_ratio;
};

Levelled levelled(const PolicyObjective& objective, const FlatSegments& segments,
                  const FlatBatch& batch, at::Tensor logp) {
  const LevelRule& level = rule_of(objective.level);
  at::Tensor log_ratio = logp - batch.old_logp;
  if (clips_log_ratios(objective)) {
    const TensorNumber u{log_ratio};
    const auto& [low, high] = objective.log_ratio_clip;
    const TensorNumber bounded =
        select(TensorNumber{batch.advantage} < 0, max(u, -low), min(u, high));
    const at::Tensor clipped = at::where(at::isfinite(log_ratio), bounded.value, log_ratio);
    log_ratio = clipped + 0 * log_ratio.detach();  // infinity is no bound
    logp = with_gradient_of({logp}, TensorNumber{log_ratio}).value;
  }
  if (level.segment == Segment::token) return {logp, log_ratio};
  const auto spread = [&](const at::Tensor& values) {
    at::Tensor sums = segments.sums(batch.weight * values);
    if (level.is_mean) {
      sums = sums / at::where(segments.n > 0, segments.n, at::ones_like(segments.n));
    }
    const double largest = largest_input(sums.scalar_type() == at::kDouble);
    sums = with_gradient_of({saturated(sums.detach(), largest)}, TensorNumber{sums}).value;
    return segments.spread(sums);
  };
  if (!level.shared) return {logp, log_ratio - log_ratio.detach() + spread(log_ratio).detach()};
  return {spread(logp), spread(log_ratio)};
}

// At each token the sum of its segment without it, which total - own would cancel.
at::Tensor sum_of_others(const FlatSegments& segments, const at::Tensor& terms) {
  const auto sums = [&](const at::Tensor& values) {
    return segments.spread(segments.sums(values));
  };
  const at::Tensor size = terms.abs();
  const at::Tensor none = at::zeros({segments.count}, terms.options());
  const at::Tensor largest = none.scatter_reduce(0, segments.index, size, "amax");
  const at::Tensor is_largest = size == segments.spread(largest);
  const at::Tensor large = at::where(is_largest, terms, at::zeros_like(terms));
  const at::Tensor small = terms - large;
  return (sums(large) - large) + (sums(small) - small);
}

// A form on tensors, as kl_term takes it.
struct TensorKl {
  const KlForm& form;
  std::string_view option;

  TensorNumber operator()(const TensorNumber& d) const {
    return {on_tensors(form, {d, /*score=*/false}, option)};
  }
  TensorNumber score(const TensorNumber& d) const {
    return {on_tensors(form, {d, /*score=*/true}, option)};
  }
};

// What the gradient of a penalty is taken for: terms that are added up with the weights, or each
// token's own.
enum class PenaltyUse { sum, token };

// The value and the gradient at each token of its penalty. Through a ratio that its segment shares:
// of a sum, by what the others of the segment give a token; of a token's own term, by the product
// rule, but for a token that is alone in its segment, where that would cancel.
at::Tensor kl_of(const PolicyObjective& objective, const FlatBatch& batch,
                 const FlatSegments& segments, const at::Tensor& logp,
                 const at::Tensor& level_log_ratio, PenaltyUse use) {
  const bool wide = logp.scalar_type() == at::kDouble;
  const KlPenalty& penalty = objective.kl;
  const KlWeightBounds bounds = weight_bounds(
      wide ? kWeightSaturation<double> : kWeightSaturation<float>, penalty.ratio_high);
  const TensorKl estimator{penalty.estimator, "kl_estimator"};
  const TensorKl gradient{penalty.gradient, "kl_gradient"};
  const TensorNumber number{logp}, ref_logp{batch.logp_of(penalty.reference)};
  const at::Tensor& v = batch.kl_weight;
  const TensorNumber log_ratio{of_level(penalty.correction)
                                   ? level_log_ratio
                                   : logp - batch.logp_of(sampler_of(penalty.correction))};
  if (penalty.correction != KlCorrection::level_ratio || !shares_ratio(objective.level)) {
    return v * kl_term(estimator, gradient, penalty.correction, number, log_ratio, ref_logp, bounds)
                   .value;
  }
  const TensorNumber d = ref_logp - stop_gradient(number);
  const TensorNumber rho = kl_weight(log_ratio, bounds);
  const at::Tensor n = segments.spread(segments.n);
  const bool is_mean = rule_of(objective.level).is_mean;
  const at::Tensor over = is_mean ? at::where(n > 0, n, 1) : at::ones_like(n);
  const at::Tensor own = v * (rho * gradient(d)).value;
  at::Tensor slope = v * (rho * gradient.score(d)).value + own * (batch.weight / over - 1);
  const TensorNumber value{v * (rho * estimator(d)).value};
  if (use == PenaltyUse::sum) {
    const at::Tensor terms = (batch.weight * own).to(at::kDouble);
    slope = slope + (sum_of_others(segments, terms) / over).to(slope.scalar_type());
    return with_gradient_of(value, {slope * logp}).value;
  }
  const TensorNumber live =
      exp(with_gradient_of(clamp(log_ratio, bounds.low, bounds.high), log_ratio));
  const at::Tensor source = v * (live * gradient(ref_logp - number)).value;
  return with_gradient_of(value, {at::where(n == batch.weight, slope * logp, source)}).value;
}

// What a token adds to the loss, before weights, and what of it the surrogate has seen.
struct TokenTerms {
  Levelled level;
  at::Tensor loss, kl;
};

// step: undefined, or added to what the surrogate sees.
TokenTerms terms_of(const PolicyObjective& objective, const FlatBatch& batch,
                    const FlatSegments& segments, const at::Tensor& logp, const at::Tensor& step,
                    PenaltyUse use) {
  const Levelled level = levelled(objective, segments, batch, logp);
  const auto stepped = [&](const at::Tensor& x) { return step.defined() ? x + step : x; };
  const TensorNumber log_ratio{stepped(level.log_ratio)};
  const at::Tensor advantage = beside_ratio(batch.advantage, level.log_ratio);
  const TensorToken token{{stepped(level.logp)}, log_ratio,        exp(log_ratio),
                          {advantage},           {batch.old_logp}, {batch.ref_logp}};
  const at::Tensor loss = bounded(on_tensors(objective.surrogate, token));
  const at::Tensor kl = objective.kl.beta > 0
                            ? bounded(kl_of(objective, batch, segments, logp, level.log_ratio, use))
                            : at::zeros_like(loss);
  return {level, loss, kl};
}

// Whether the inputs of a token are finite and nothing that comes of them is NaN. A reference
// counts under a penalty.
at::Tensor sound_tokens(const FlatBatch& batch, const at::Tensor& log_ratio, const at::Tensor& loss,
                        const at::Tensor& dloss, const at::Tensor& kl, const KlPenalty& penalty) {
  at::Tensor sound = at::isfinite(log_ratio).logical_and(at::isfinite(batch.token_weight));
  std::vector<at::Tensor> seen{batch.logp, batch.old_logp, batch.advantage};
  if (penalty.beta > 0) {
    seen.insert(seen.end(), {batch.logp_of(penalty.reference),
                             batch.logp_of(sampler_of(penalty.correction)), batch.kl_weight});
  }
  for (const at::Tensor& each : seen) sound = sound.logical_and(at::isfinite(each));
  for (const at::Tensor& each : {loss, dloss, kl}) {
    sound = sound.logical_and(at::isnan(each).logical_not());
  }
  return sound;
}

double largest_ratio_of(at::ScalarType type) {
  return type == at::kDouble ? kLargestRatio<double> : double(kLargestRatio<float>);
}

// Tokens that are clipped, by the three fractions of PolicyMetrics.
struct Clipped {
  at::Tensor low, high, dual;
};

Clipped clipped_tokens(const RatioInterval& inside, const at::Tensor& advantage,
                       const at::Tensor& d, const at::Tensor& ratio, const at::Tensor& dloss) {
  const at::Tensor stuck = dloss == 0, moves = stuck.logical_not();
  const at::Tensor bad = advantage < 0, good = advantage > 0;
  const at::Tensor below = stuck.logical_and(bad.logical_or(good)).logical_and(d < 0);
  const at::Tensor above =
      stuck.logical_and(d > 0).logical_or(moves.logical_and(ratio > inside.high));
  return {below.logical_or(moves.logical_and(ratio < inside.low)), good.logical_and(above),
          bad.logical_and(above)};
}

// The largest log-ratio, its negative and weight of active tokens.
at::Tensor maxima_of(const at::Tensor& active, const at::Tensor& sound, const at::Tensor& d,
                     const at::Tensor& W) {
  const at::Tensor lowest = at::zeros({1}, d.options()) - PolicyMetrics::kUnseen;
  const auto largest = [&](const at::Tensor& values, const at::Tensor& among) {
    const at::Tensor seen = at::where(active.logical_and(among), values, lowest);
    return at::cat({seen, lowest}).max().to(at::kDouble);
  };
  return at::stack({largest(d, sound), largest(-d, sound), largest(W, at::isnan(W).logical_not())});
}

// What each sum is divided by.
at::Tensor counts_of(const at::Tensor& tokens, const at::Tensor& ratios) {
  std::vector<at::Tensor> counts(PolicyMetrics::kSums);
  for (int i = 0; i < PolicyMetrics::kSums; ++i) {
    counts[static_cast<size_t>(i)] = PolicyMetrics::is_of_ratio(i) ? ratios : tokens;
  }
  return at::stack(counts);
}

PolicyMetricTensors metrics_of(const PolicyObjective& objective, const FlatBatch& batch,
                               const FlatSegments& segments, const at::Tensor& d,
                               const at::Tensor& loss, const at::Tensor& dloss,
                               const at::Tensor& kl, const at::Tensor& sound) {
  using M = PolicyMetrics;
  const bool by_token = objective.level == RatioLevel::token;
  const at::Tensor ratio = exp(TensorNumber{d}).value;
  const double largest_ratio = largest_ratio_of(ratio.scalar_type());
  const at::Tensor seen_ratio = ratio.clamp_max(largest_ratio);
  const at::Tensor W = batch.token_weight.clamp(-largest_ratio, largest_ratio);
  const Clipped clipped =
      clipped_tokens(objective.surrogate.truncation(), batch.advantage, d, ratio, dloss);
  const auto sum = [&](const at::Tensor& values) {
    return at::where(batch.active, batch.weight * values, 0.0).to(at::kDouble).sum();
  };
  // Of the ratio: each segment counts once.
  const auto ratio_sum = [&](const at::Tensor& values) {
    return by_token ? sum(values) : sum(values / segments.spread(segments.n));
  };
  std::vector<at::Tensor> sums(M::kSums);
  sums[M::kPolicyLoss] = sum(bounded(batch.token_weight * loss) + spoiled(sound, d));
  sums[M::kKl] = sum(kl);
  const at::Tensor entropy = batch.entropy_weight * batch.entropy;
  sums[M::kEntropy] = sum(entropy);
  sums[M::kClipFractionLow] = ratio_sum(clipped.low);
  sums[M::kClipFractionHigh] = ratio_sum(clipped.high);
  sums[M::kClipFractionDual] = ratio_sum(clipped.dual);
  sums[M::kApproxKlK1] = ratio_sum(-d);
  sums[M::kApproxKlK3] = ratio_sum(k3(TensorNumber{d}).value);
  sums[M::kRatio] = ratio_sum(seen_ratio);
  sums[M::kRatioSquared] = ratio_sum(seen_ratio.square());
  sums[M::kNonfinite] = at::zeros({}, d.options().dtype(at::kDouble));
  for (const at::Tensor& each : {sound, at::isfinite(entropy)}) {
    sums[M::kNonfinite] += batch.active.logical_and(each.logical_not()).to(at::kDouble).sum();
  }
  sums[M::kWeight] = sum(W);
  sums[M::kWeightSquared] = sum(W.square());
  sums[M::kWeightZero] = sum(W == 0);
  const at::Tensor count = batch.weight.to(at::kDouble).sum();
  const at::Tensor ratios = by_token ? count : (segments.n > 0).to(at::kDouble).sum();
  return {.sums = at::stack({at::stack(sums), counts_of(count, ratios)}, 1),
          .maxima = maxima_of(batch.active, sound, d, W)};
}

// The factors of the terms of each row in the loss, in double; `tokens`: what a mean over tokens
// divides by.
at::Tensor factors_of(const std::optional<double>& tokens, const Aggregation& aggregation,
                      const Normalizer& normalizer, double coefficient, const FlatBatch& batch,
                      const at::Tensor& row_tokens) {
  const at::Tensor n = batch.row_tokens.to(at::kDouble);
  const at::Tensor lengths = row_tokens.defined() ? row_tokens.to(at::kDouble) : n;
  const at::Tensor factors = row_factors(aggregation, tokens, normalizer.sequences, n, lengths);
  const double scale = tether::bounded(tether::bounded(normalizer.factor()) * coefficient);
  return bounded(bounded(factors) * scale);
}

// Terms that a loss adds up. Their gradients are found without the factors: on its way the product
// with one may overflow beside a 0.
struct LossTerms {
  const FlatBatch& batch;
  at::Tensor terms, factors;

  at::Tensor value() const {
    const at::Tensor weighted = (batch.weight * seen().detach()).to(at::kDouble);
    return bounded(row_sums(batch, weighted) * factors).sum();
  }
  // `shared`: tokens add up what they give x, each with its weight.
  at::Tensor gradient(const at::Tensor& x, bool shared) const {
    const at::Tensor each = shared ? batch.weight * seen() : seen();
    const at::Tensor slope = bounded(derivative(each.sum(), x));
    const at::Tensor factor = bounded(factors.to(slope.scalar_type())).index_select(0, batch.row);
    return bounded((shared ? factor : batch.weight * factor) * slope);
  }

 private:
  at::Tensor seen() const { return at::where(batch.active, terms, at::zeros_like(terms)); }
};

// Infinity is NaN.
at::Tensor weighted_entropy(const FlatBatch& batch, const at::Tensor& entropy) {
  const at::Tensor weighted = batch.entropy_weight * entropy;
  return weighted + 0 * weighted.detach();
}

}  // namespace

at::Tensor tensor_token_losses(const PolicyBatch& given, const PolicyObjective& objective) {
  const PolicyBatch batch = gated(given, objective);
  FlatBatch flat = flattened(batch, weights_that(false, objective.weights));
  const bool wide = flat.weight.scalar_type() == at::kDouble;
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.to(flat.weight.scalar_type()).reshape({-1});
    const at::Tensor x = at::where(flat.active, values, at::zeros_like(values));
    return with_gradient_of({saturated(x.detach(), largest_input(wide))}, TensorNumber{x}).value;
  };
  const at::Tensor logp = selected(batch.logps);
  const LevelRule& rule = rule_of(objective.level);
  const FlatSegments segments = segments_of(flat, rule.segment, turn_ids_of(batch));
  const auto [level, loss, kl] = terms_of(objective, flat, segments, logp, {}, PenaltyUse::token);
  const at::Tensor sound = sound_tokens(flat, level.log_ratio.detach(), loss.detach(),
                                        at::zeros_like(loss), kl.detach(), objective.kl);
  at::Tensor each = bounded(flat.token_weight * loss) + kl * objective.kl.beta;
  if (objective.entropy.coefficient != 0) {
    each = each - weighted_entropy(flat, selected(batch.entropies)) * objective.entropy.coefficient;
  }
  each = each + spoiled(sound, level.logp);
  return at::where(flat.active, each, at::zeros_like(each)).view(batch.logps.sizes());
}

ComputedLoss tensor_policy_loss(const PolicyBatch& given, const PolicyObjective& objective,
                                const Normalizer& normalizer, WantedGradients wanted) {
  // The counts of the batch are not waited for.
  step_counts("policy_loss", normalizer, TermCounts{}, objective.aggregation);
  // Under the caller's inference mode there would be no gradient to take here.
  const c10::InferenceMode normal(false);
  const PolicyBatch batch = gated(given, objective);
  const FlatBatch flat = flattened(batch, weights_that(false, objective.weights));
  // The gradient is taken here, with the loss, so that backward is a scaling as on the CPU.
  at::AutoGradMode enabled(true);
  const at::Tensor logp = flat.logp.detach().requires_grad_(true);
  const at::Tensor entropy = flat.entropy.detach().requires_grad_(true);
  // 0, and what the surrogate's own slope d S / d L is the derivative by.
  const at::Tensor step = at::zeros_like(logp).requires_grad_(true);
  const FlatSegments segments =
      segments_of(flat, rule_of(objective.level).segment, turn_ids_of(batch));
  const auto [level, loss, kl] = terms_of(objective, flat, segments, logp, step, PenaltyUse::sum);
  const at::Tensor dloss = derivative(loss.sum(), step);
  const at::Tensor sound =
      sound_tokens(flat, level.log_ratio.detach(), loss.detach(), dloss, kl.detach(), objective.kl);
  const at::Tensor spoil = spoiled(sound, level.logp);
  const auto sum_of = [&](const at::Tensor& terms, const std::optional<double>& tokens,
                          double coefficient) {
    return LossTerms{
        flat, terms,
        factors_of(tokens, objective.aggregation, normalizer, coefficient, flat, batch.row_tokens)};
  };
  const auto& kl_tokens = normalizer.kl ? normalizer.kl : normalizer.policy;
  const LossTerms surrogates =
      sum_of(bounded(flat.token_weight * loss) + spoil, normalizer.policy, 1);
  const LossTerms penalties = sum_of(kl, kl_tokens, objective.kl.beta);
  LossTerms bonus = sum_of(weighted_entropy(flat, entropy), normalizer.policy, 1);
  bonus.factors = bounded(bonus.factors * -objective.entropy.coefficient);
  at::Tensor total = surrogates.value();
  if (objective.kl.beta > 0) total = total + penalties.value();
  if (objective.entropy.coefficient != 0) total = total + bonus.value();

  ComputedLoss out;
  if (wanted.logps) {
    out.dlogps = surrogates.gradient(logp, shares_ratio(objective.level));
    if (objective.kl.beta > 0) out.dlogps = bounded(out.dlogps + penalties.gradient(logp, false));
    out.dlogps = out.dlogps.view(batch.logps.sizes());
  }
  if (wanted.entropies) out.dentropies = bonus.gradient(entropy, false).view(batch.logps.sizes());
  at::AutoGradMode disabled(false);
  out.loss = narrowed(total, batch.logps);
  out.metrics = metrics_of(objective, flat, segments, level.log_ratio.detach(), loss.detach(),
                           dloss, kl.detach(), sound);
  return out;
}

}  // namespace tether::detail
