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

struct TokenLoss {
  Dual<double> surrogate, kl;
};

// One token in a column of its own.
TokenLoss token_loss(const PolicyObjective& objective, double logp, double old_logp,
                     double ref_logp, double advantage) {
  constexpr int size = 16;
  double logps[size], log_ratios[size], ratios[size], advantages[size], old_logps[size],
      ref_logps[size];
  double value[size], slope[size];
  std::fill_n(logps, size, logp);
  std::fill_n(log_ratios, size, logp - old_logp);
  std::fill_n(ratios, size, exp(Constant<double>{logp - old_logp}).value);
  std::fill_n(advantages, size, advantage);
  std::fill_n(old_logps, size, old_logp);
  std::fill_n(ref_logps, size, ref_logp);
  objective.surrogate(
      TokenColumns<double>{logps, log_ratios, ratios, advantages, old_logps, ref_logps, size},
      value, slope);
  const double u = ref_logp - logp;
  return {{value[0], slope[0]}, {std::expm1(u) - u, -std::expm1(u)}};
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
  }
  return 0;
}

double row_sum(const std::vector<double>& weights, int64_t row, int64_t columns) {
  double sum = 0;
  for (int64_t column = 0; column < columns; ++column) {
    sum += weights[static_cast<size_t>(row * columns + column)];
  }
  return sum;
}

struct Totals {
  double loss = 0;
  std::vector<double> gradient;
  std::map<std::string, double> metrics;
};

void add_metrics(std::map<std::string, double>& metrics, double share, double log_ratio,
                 double advantage, const TokenLoss& loss) {
  const double ratio = std::exp(log_ratio);
  const bool stuck = loss.surrogate.grad == 0;
  metrics["policy_loss"] += share * loss.surrogate.value;
  metrics["approx_kl_k1"] -= share * log_ratio;
  metrics["approx_kl_k3"] += share * (std::expm1(log_ratio) - log_ratio);
  metrics["ratio_mean"] += share * ratio;
  metrics["ratio_squared_mean"] += share * ratio * ratio;
  metrics["clip_fraction_low"] += share * (stuck && advantage < 0 && log_ratio < 0);
  metrics["clip_fraction_high"] += share * (stuck && advantage > 0 && log_ratio > 0);
  metrics["clip_fraction_dual"] += share * (stuck && advantage < 0 && log_ratio > 0);
}

Totals totals(const PolicyBatch& batch, const PolicyObjective& objective, const Normalizer& step) {
  const int64_t rows = batch.logps.size(0), columns = batch.logps.size(1);
  const double beta = objective.kl.beta;
  const auto logps = doubles(batch.logps), weights = doubles(batch.response_mask);
  const auto olds = doubles(batch.old_logps.defined() ? batch.old_logps : batch.logps);
  const auto refs = doubles(batch.ref_logps.defined() ? batch.ref_logps : batch.logps);
  const bool shared = batch.advantages.dim() == 1;
  const auto advantages = doubles(batch.advantages);

  double tokens = 0, sequences = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double n = row_sum(weights, row, columns);
    tokens += n;
    sequences += n > 0 ? 1 : 0;
  }
  const double policy_tokens = step.policy.value_or(tokens);
  const double kl_tokens = step.kl.value_or(policy_tokens);
  const double step_sequences = step.sequences.value_or(sequences);

  Totals out{.loss = 0, .gradient = std::vector<double>(logps.size()), .metrics = {}};
  for (int64_t row = 0; row < rows; ++row) {
    const double n = row_sum(weights, row, columns);
    for (int64_t column = 0; column < columns; ++column) {
      const auto i = static_cast<size_t>(row * columns + column);
      if (weights[i] == 0) continue;
      const double A = advantages[shared ? static_cast<size_t>(row) : i];
      const TokenLoss token = token_loss(objective, logps[i], olds[i], refs[i], A);
      const double policy_share =
          weights[i] / denominator(objective.aggregation, policy_tokens, step_sequences, n);
      const double kl_share =
          weights[i] / denominator(objective.aggregation, kl_tokens, step_sequences, n);
      out.loss += policy_share * token.surrogate.value + beta * kl_share * token.kl.value;
      out.gradient[i] =
          step.world_size * (policy_share * token.surrogate.grad + beta * kl_share * token.kl.grad);
      add_metrics(out.metrics, weights[i] / tokens, logps[i] - olds[i], A, token);
      if (beta > 0) out.metrics["kl"] += weights[i] / tokens * token.kl.value;
    }
  }
  out.loss *= step.world_size;
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
