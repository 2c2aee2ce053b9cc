#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "testing/policy_checks.h"

namespace tether::testing {
namespace {

std::vector<double> doubles(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

// What a surrogate sees of a token: the log-ratio of its level (rl/level.h).
struct View {
  double logp, log_ratio;
};

// Value and slope of the surrogate, from a column of 16 equal tokens.
Dual<double> surrogate_of(const PolicyObjective& objective, const View& view, double old_logp,
                          double ref_logp, double advantage) {
  constexpr int size = 16;
  double logps[size], log_ratios[size], ratios[size], advantages[size], old_logps[size],
      ref_logps[size];
  double value[size], slope[size];
  std::fill_n(logps, size, view.logp);
  std::fill_n(log_ratios, size, view.log_ratio);
  std::fill_n(ratios, size, exp(Constant<double>{view.log_ratio}).value);
  std::fill_n(advantages, size, advantage);
  std::fill_n(old_logps, size, old_logp);
  std::fill_n(ref_logps, size, ref_logp);
  objective.surrogate(
      TokenColumns<double>{logps, log_ratios, ratios, advantages, old_logps, ref_logps, size},
      value, slope);
  return {value[0], slope[0]};
}

// Value, slope and score of a form at one token, by its own loops.
struct Estimate {
  double value = 0, slope = 0, score = 0;
};
Estimate estimate(const KlForm& form, double logp, double ref_logp) {
  constexpr int size = 16;
  double logps[size], ref_logps[size], value[size], slope[size], score[size];
  std::fill_n(logps, size, logp);
  std::fill_n(ref_logps, size, ref_logp);
  const KlColumns<double> in{logps, ref_logps, size};
  form.value_and_slope(in, value, slope);
  form.score(in, score);
  return {value[0], slope[0], score[0]};
}

// rl/kl_penalty.h: value, its derivative by the token's own logp, and by the log-ratio that a row
// shares.
struct Penalty {
  double value = 0, own_slope = 0, shared_slope = 0;
};

Penalty penalty_of(const PolicyObjective& objective, double logp, double sampler_logp,
                   double ref_logp, double level_log_ratio) {
  const KlPenalty& kl = objective.kl;
  const double log_ratio = of_level(kl.correction) ? level_log_ratio : logp - sampler_logp;
  const double rho = weighs(kl.correction)
                         ? std::min(std::exp(std::clamp(log_ratio, -100.0, 100.0)), kl.ratio_high)
                         : 1;
  const Estimate source = estimate(kl.gradient, logp, ref_logp);
  Penalty out{rho * estimate(kl.estimator, logp, ref_logp).value, rho * source.slope, 0};
  if (!through_ratio(kl.correction)) return out;
  if (of_level(kl.correction) && shares_ratio(objective.level)) {
    out.shared_slope = rho * source.value;
  } else {
    out.own_slope = rho * source.score;
  }
  return out;
}

double denominator(const Aggregation& aggregation, double tokens, double sequences,
                   double row_tokens) {
  switch (aggregation.mode) {
    case Aggregation::Mode::token_mean:
      return tokens;
    case Aggregation::Mode::sequence_mean_token_mean:
      return sequences * row_tokens;
    case Aggregation::Mode::sequence_mean_token_sum:
      return sequences;
    case Aggregation::Mode::sequence_sum_over_constant:
      return sequences * aggregation.constant;
    case Aggregation::Mode::token_sum:
      return 1;
  }
  return 0;
}

// A column of 16 equal tokens, for a loop over them.
struct WeightColumn {
  double logp[16], old_logp[16], ref_logp[16], rollout_logp[16], advantage[16];

  WeightColumns<double> columns() const {
    return {logp, old_logp, ref_logp, rollout_logp, advantage, 16};
  }
};

// The tokens of one row, or of a turn in it, with a weight.
struct Row {
  std::vector<size_t> slots;
  double n = 0, logp = 0, log_ratio = 0;  // sums over w
};

struct Totals {
  double loss = 0;
  std::vector<double> gradient;
  std::map<std::string, double> metrics;
};

// What is said of ratios, of a token's share in them.
void add_ratio_metrics(std::map<std::string, double>& metrics, double share, double log_ratio,
                       double advantage, const Dual<double>& loss, const RatioInterval& inside) {
  const double ratio = std::exp(log_ratio);
  const bool truncated = loss.grad != 0 && ratio < inside.low;
  const bool stuck = loss.grad == 0 || ratio > inside.high;
  metrics["approx_kl_k1"] -= share * log_ratio;
  metrics["approx_kl_k3"] += share * (std::expm1(log_ratio) - log_ratio);
  metrics["ratio_mean"] += share * ratio;
  metrics["ratio_squared_mean"] += share * ratio * ratio;
  metrics["clip_fraction_low"] += share * ((stuck && advantage != 0 && log_ratio < 0) || truncated);
  metrics["clip_fraction_high"] += share * (stuck && advantage > 0 && log_ratio > 0);
  metrics["clip_fraction_dual"] += share * (stuck && advantage < 0 && log_ratio > 0);
}

View view_of(const LevelRule& level, const Row& segment, double logp, double log_ratio) {
  if (level.segment == Segment::token) return {logp, log_ratio};
  const double over = level.is_mean ? segment.n : 1;
  return {level.shared ? segment.logp / over : logp, segment.log_ratio / over};
}

// The numbers of a batch, an advantage for each token, and what is counted in them.
struct Tokens {
  std::vector<double> logps, weights, olds, refs, rollouts, advantages;
  std::vector<Row> rows;
  std::vector<Row> turns;
  std::vector<size_t> turn_of;  // of each token
  double tokens = 0, sequences = 0;

  const std::vector<double>& logps_of(KlReference policy) const {
    if (policy == KlReference::reference) return refs;
    return policy == KlReference::old ? olds : rollouts;
  }
  // What a level counts by, and the one of a token.
  double count(Segment segment) const {
    if (segment == Segment::token) return tokens;
    return segment == Segment::row ? sequences : static_cast<double>(turns.size());
  }
  const Row& segment_of(Segment segment, size_t i, const Row& row) const {
    return segment == Segment::turn ? turns[turn_of[i]] : row;
  }
};

// What tells turns apart: ids, or the number of masked slots before.
std::vector<double> turn_ids(const PolicyBatch& batch) {
  if (batch.turn_ids.defined()) return doubles(batch.turn_ids);
  std::vector<double> out = doubles(batch.response_mask);
  double masked = 0;
  for (double& each : out) each = masked += each == 0 ? 1 : 0;
  return out;
}

// A token's log-ratio as its level counts it (rl/level.h).
double counted(const LogRatioClip& clip, double log_ratio, double advantage) {
  return advantage < 0 ? std::max(log_ratio, -clip.low) : std::min(log_ratio, clip.high);
}

Tokens tokens_of(const PolicyBatch& batch, const std::vector<double>& weights,
                 const LogRatioClip& clip) {
  const auto columns = static_cast<size_t>(batch.logps.size(1));
  Tokens out{.logps = doubles(batch.logps),
             .weights = weights,
             .olds = doubles(batch.old_logps.defined() ? batch.old_logps : batch.logps),
             .refs = doubles(batch.ref_logps.defined() ? batch.ref_logps : batch.logps),
             .rollouts = doubles(batch.rollout_logps.defined() ? batch.rollout_logps : batch.logps),
             .advantages = doubles(batch.advantages.dim() == 1
                                       ? batch.advantages.unsqueeze(1).expand_as(batch.logps)
                                       : batch.advantages),
             .rows = std::vector<Row>(static_cast<size_t>(batch.logps.size(0))),
             .turns = {},
             .turn_of = std::vector<size_t>(weights.size())};
  const std::vector<double> ids = turn_ids(batch);
  for (size_t i = 0; i < out.weights.size(); ++i) {
    const double w = out.weights[i];
    if (w == 0) continue;
    Row& row = out.rows[i / columns];
    if (row.slots.empty() || ids[row.slots.back()] != ids[i]) out.turns.emplace_back();
    out.turn_of[i] = out.turns.size() - 1;
    for (Row* segment : {&row, &out.turns.back()}) {
      segment->slots.push_back(i);
      segment->n += w;
      segment->logp += w * out.logps[i];
      segment->log_ratio += w * counted(clip, out.logps[i] - out.olds[i], out.advantages[i]);
    }
    out.tokens += w;
  }
  for (const Row& row : out.rows) out.sequences += row.n > 0 ? 1 : 0;
  return out;
}

WeightColumn column_of(const Tokens& in, size_t i) {
  WeightColumn out;
  std::fill_n(out.logp, 16, in.logps[i]);
  std::fill_n(out.old_logp, 16, in.olds[i]);
  std::fill_n(out.ref_logp, 16, in.refs[i]);
  std::fill_n(out.rollout_logp, 16, in.rollouts[i]);
  std::fill_n(out.advantage, 16, in.advantages[i]);
  return out;
}

// What a formula measures of the token at slot i.
double measured(const WeightFormula& formula, const Tokens& in, size_t i) {
  double out[16];
  formula.measure(column_of(in, i).columns(), out);
  return out[0];
}

// The measures of a segment (rl/token_weight.h).
double reduced(Reduction reduction, const WeightFormula& formula, const Tokens& in,
               const Row& segment) {
  double sum = 0, smallest = infinity, largest = -infinity;
  for (const size_t i : segment.slots) {
    const double x = measured(formula, in, i);
    sum += in.weights[i] * x;
    smallest = std::min(smallest, x);
    largest = std::max(largest, x);
  }
  switch (reduction) {
    case Reduction::mean:
      return sum / segment.n;
    case Reduction::min:
      return smallest;
    case Reduction::max:
      return largest;
    default:
      return sum;
  }
}

// What a weight looks at, for each token of a row: a segment's own is measured once.
std::vector<double> statistics_of(const Tokens& in, const Row& row, const TokenWeight& weight) {
  const auto& [name, segment, reduction] = rule_of(weight.level);
  std::map<const Row*, double> of_segments;
  std::vector<double> out;
  for (const size_t i : row.slots) {
    if (segment == Segment::token) {
      out.push_back(measured(weight.formula, in, i));
      continue;
    }
    const Row& around = in.segment_of(segment, i, row);
    const auto [found, is_new] = of_segments.try_emplace(&around);
    if (is_new) found->second = reduced(reduction, weight.formula, in, around);
    out.push_back(found->second);
  }
  return out;
}

// W of the tokens of a row.
std::vector<double> token_weights(const Tokens& in, const Row& row,
                                  const std::vector<TokenWeight>& weights) {
  std::vector<double> out(row.slots.size(), 1);
  for (const TokenWeight& each : weights) {
    const std::vector<double> statistics = statistics_of(in, row, each);
    for (size_t k = 0; k < out.size(); ++k) {
      double statistic[16], weight[16];
      std::fill_n(statistic, 16, statistics[k]);
      std::fill_n(weight, 16, out[k]);
      each.formula.multiply(column_of(in, row.slots[k]).columns(), statistic, weight);
      out[k] = weight[0];
    }
  }
  return out;
}

// The weights of the mask, 0 where a weight of the objective takes a token out.
std::vector<double> kept_weights(const Tokens& in, const PolicyObjective& objective) {
  std::vector<double> out = in.weights;
  for (const Row& row : in.rows) {
    const std::vector<double> gate = token_weights(in, row, weights_that(true, objective.weights));
    for (size_t k = 0; k < gate.size(); ++k) out[row.slots[k]] *= gate[k];
  }
  return out;
}

// Adds a row to the totals, before the factor of the step.
void add_row(const Tokens& in, const Row& row, const PolicyObjective& objective,
             const Normalizer& step, Totals& out) {
  const double beta = objective.kl.beta, policy_tokens = step.policy.value_or(in.tokens);
  const LevelRule& level = rule_of(objective.level);
  const auto share_of = [&](size_t i, double count) {
    return in.weights[i] /
           denominator(objective.aggregation, count, step.sequences.value_or(in.sequences), row.n);
  };
  std::map<const Row*, double> shared_slopes;  // by a segment's log-ratio
  const std::vector<double> of_tokens =
      token_weights(in, row, weights_that(false, objective.weights));
  for (size_t k = 0; k < row.slots.size(); ++k) {
    const size_t i = row.slots[k];
    const double W = of_tokens[k];
    const double logp = in.logps[i], old = in.olds[i], ref = in.refs[i], A = in.advantages[i];
    const Row& segment = in.segment_of(level.segment, i, row);
    const View view = view_of(level, segment, logp, logp - old);
    const Dual<double> loss = surrogate_of(objective, view, old, ref, A);
    const double anchor = in.logps_of(objective.kl.reference)[i];
    const double sampler = in.logps_of(sampler_of(objective.kl.correction))[i];
    const Penalty kl = penalty_of(objective, logp, sampler, anchor, view.log_ratio);
    const double share = share_of(i, policy_tokens);
    const double kl_share = beta * share_of(i, step.kl.value_or(policy_tokens));
    out.loss += share * W * loss.value + kl_share * kl.value;
    shared_slopes[&segment] += share * W * loss.grad + kl_share * kl.shared_slope;
    out.gradient[i] = (level.shared ? 0 : share * W * loss.grad) + kl_share * kl.own_slope;
    const double weight = in.weights[i] / in.tokens;
    const double n = level.segment == Segment::token ? 1 : segment.n;
    add_ratio_metrics(out.metrics, in.weights[i] / (n * in.count(level.segment)), view.log_ratio, A,
                      loss, objective.surrogate.truncation());
    out.metrics["policy_loss"] += weight * W * loss.value;
    out.metrics["weight_mean"] += weight * W;
    out.metrics["weight_squared_mean"] += weight * W * W;
    out.metrics["weight_zero_fraction"] += weight * (W == 0);
    if (beta > 0) out.metrics["kl"] += weight * kl.value;
  }
  if (!level.shared) return;
  for (const auto& [segment, slope] : shared_slopes) {
    const double over = level.is_mean ? segment->n : 1;
    for (size_t i : segment->slots) {
      const double u = in.logps[i] - in.olds[i];
      if (counted(objective.log_ratio_clip, u, in.advantages[i]) != u) continue;
      out.gradient[i] += slope * in.weights[i] / over;
    }
  }
}

Totals totals(const PolicyBatch& batch, const PolicyObjective& objective, const Normalizer& step) {
  const LogRatioClip clip = clips_log_ratios(objective) ? objective.log_ratio_clip : LogRatioClip{};
  const Tokens all = tokens_of(batch, doubles(batch.response_mask), clip);
  const Tokens in = tokens_of(batch, kept_weights(all, objective), clip);
  Totals out{.loss = 0, .gradient = std::vector<double>(in.logps.size()), .metrics = {}};
  for (const Row& row : in.rows) add_row(in, row, objective, step, out);
  for (double& slope : out.gradient) slope *= step.factor();
  out.loss *= step.factor();
  return out;
}

}  // namespace

PolicyLoss reference_of(const PolicyObjective& objective) {
  return [objective](const PolicyBatch& batch, const Normalizer& step) {
    const Totals sums = totals(batch, objective, step);
    const at::Tensor gradient = at::empty(batch.logps.sizes(), at::dtype(at::kDouble));
    if (!sums.gradient.empty()) {
      std::memcpy(gradient.data_ptr(), sums.gradient.data(), sums.gradient.size() * sizeof(double));
    }
    // A tensor of this value whose derivative is this gradient.
    const at::Tensor linear = (batch.logps.to(at::kDouble) * gradient).sum();
    return Result(linear - linear.detach() + sums.loss, sums.metrics);
  };
}

}  // namespace tether::testing
