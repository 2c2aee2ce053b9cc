#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "testing/policy_case.h"

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

Dual<double> estimate(KlEstimator estimator, double d) {
  switch (estimator) {
    case KlEstimator::k1:
      return {-d, 1};
    case KlEstimator::k2:
      return {d * d / 2, -d};
    case KlEstimator::k3:
    case KlEstimator::k_lambda:
      break;
  }
  return {std::expm1(d) - d, -std::expm1(d)};
}

// d/d log sampled [rho K] / rho, by hand.
double score(KlEstimator estimator, double d) {
  switch (estimator) {
    case KlEstimator::k1:
      return 1 - d;
    case KlEstimator::k2:
      return d * d / 2 - d;
    case KlEstimator::k3:
    case KlEstimator::k_lambda:
      break;
  }
  return -d;
}

// rl/kl_penalty.h: value, its derivative by the token's own logp, and by the log-ratio that a row
// shares.
struct Penalty {
  double value = 0, own_slope = 0, shared_slope = 0;
};

Penalty penalty_of(const PolicyObjective& objective, double logp, double old_logp, double ref_logp,
                   double level_log_ratio) {
  const KlPenalty& kl = objective.kl;
  const double log_ratio = of_level(kl.correction) ? level_log_ratio : logp - old_logp;
  const double rho =
      kl.correction == KlCorrection::none ? 1 : std::exp(std::clamp(log_ratio, -100.0, 100.0));
  const Dual<double> source = estimate(kl.gradient, ref_logp - logp);
  Penalty out{rho * estimate(kl.estimator, ref_logp - logp).value, rho * source.grad, 0};
  if (!through_ratio(kl.correction)) return out;
  if (of_level(kl.correction) && shares_ratio(objective.level)) {
    out.shared_slope = rho * source.value;
  } else {
    out.own_slope = rho * score(kl.gradient, ref_logp - logp);
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

// The tokens of one row with a weight.
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
  metrics["clip_fraction_low"] += share * ((stuck && advantage < 0 && log_ratio < 0) || truncated);
  metrics["clip_fraction_high"] += share * (stuck && advantage > 0 && log_ratio > 0);
  metrics["clip_fraction_dual"] += share * (stuck && advantage < 0 && log_ratio > 0);
}

View view_of(RatioLevel level, const Row& row, double logp, double log_ratio) {
  switch (level) {
    case RatioLevel::token:
      break;
    case RatioLevel::sequence_mean:
      return {row.logp / row.n, row.log_ratio / row.n};
    case RatioLevel::sequence_token:
      return {logp, row.log_ratio / row.n};
    case RatioLevel::sequence_sum:
      return {row.logp, row.log_ratio};
  }
  return {logp, log_ratio};
}

Totals totals(const PolicyBatch& batch, const PolicyObjective& objective, const Normalizer& step) {
  const int64_t columns = batch.logps.size(1);
  const double beta = objective.kl.beta;
  const auto logps = doubles(batch.logps), weights = doubles(batch.response_mask);
  const auto olds = doubles(batch.old_logps.defined() ? batch.old_logps : batch.logps);
  const auto refs = doubles(batch.ref_logps.defined() ? batch.ref_logps : batch.logps);
  const bool shared = batch.advantages.dim() == 1;
  const auto advantages = doubles(batch.advantages);

  std::vector<Row> rows(static_cast<size_t>(batch.logps.size(0)));
  double tokens = 0, sequences = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    Row& row = rows[i / static_cast<size_t>(columns)];
    row.slots.push_back(i);
    row.n += weights[i];
    row.logp += weights[i] * logps[i];
    row.log_ratio += weights[i] * (logps[i] - olds[i]);
    tokens += weights[i];
  }
  for (const Row& row : rows) sequences += row.n > 0 ? 1 : 0;
  const double policy_tokens = step.policy.value_or(tokens);
  const double kl_tokens = step.kl.value_or(policy_tokens);
  const double step_sequences = step.sequences.value_or(sequences);

  Totals out{.loss = 0, .gradient = std::vector<double>(logps.size()), .metrics = {}};
  for (size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    const auto share_of = [&](size_t i, double count) {
      return weights[i] / denominator(objective.aggregation, count, step_sequences, row.n);
    };
    double row_slope = 0;  // by the row's log-ratio, where its tokens share one
    for (size_t i : row.slots) {
      const double A = advantages[shared ? r : i];
      const View view = view_of(objective.level, row, logps[i], logps[i] - olds[i]);
      const Dual<double> loss = surrogate_of(objective, view, olds[i], refs[i], A);
      const Penalty kl = penalty_of(objective, logps[i], olds[i], refs[i], view.log_ratio);
      const double policy_share = share_of(i, policy_tokens), kl_share = share_of(i, kl_tokens);
      out.loss += policy_share * loss.value + beta * kl_share * kl.value;
      row_slope += policy_share * loss.grad + beta * kl_share * kl.shared_slope;
      const double own_slope = shares_ratio(objective.level) ? 0 : policy_share * loss.grad;
      out.gradient[i] = own_slope + beta * kl_share * kl.own_slope;
      const bool by_row = objective.level != RatioLevel::token;
      const double ratio_share = weights[i] / (by_row ? row.n * sequences : tokens);
      add_ratio_metrics(out.metrics, ratio_share, view.log_ratio, A, loss,
                        objective.surrogate.truncation());
      out.metrics["policy_loss"] += weights[i] / tokens * loss.value;
      if (beta > 0) out.metrics["kl"] += weights[i] / tokens * kl.value;
    }
    const double over = objective.level == RatioLevel::sequence_mean ? row.n : 1;
    for (size_t i : row.slots) {
      if (shares_ratio(objective.level)) out.gradient[i] += row_slope * weights[i] / over;
      out.gradient[i] *= step.factor();
    }
  }
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
