#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/repeat_interleave.h>
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
#include "libtorch/policy_batch.h"

// policy_loss by torch's operations: the formulas on TensorNumber, every token of the batch side by
// side in one dimension, with the index of its row.

namespace tether::detail {
namespace {

struct FlatBatch {
  at::Tensor weight, active;  // [N]
  at::Tensor row;             // [N], the row of each token
  int64_t rows;
  at::Tensor logp, old_logp, ref_logp, advantage, entropy;  // [N], 0 in masked slots
};

at::Tensor row_of_tokens(const PolicyBatch& batch, int64_t rows) {
  const auto options = at::dtype(at::kLong).device(batch.logps.device());
  const at::Tensor rows_index = at::arange(rows, options);
  if (!batch.offsets.defined()) {
    return rows_index.unsqueeze(1).expand(batch.logps.sizes()).reshape({-1});
  }
  const at::Tensor lengths = batch.offsets.diff().to(at::kLong);
  check_value(lengths.numel() == 0 || lengths.min().item<int64_t>() >= 0,
              "policy_loss: offsets must not decrease");
  return at::repeat_interleave(rows_index, lengths.to(batch.logps.device()));
}

FlatBatch flattened(const PolicyBatch& batch) {
  const bool wide = batch.logps.scalar_type() == at::kDouble;
  const auto dtype = wide ? at::kDouble : at::kFloat;
  FlatBatch out;
  out.rows = batch.offsets.defined() ? batch.offsets.size(0) - 1 : batch.logps.size(0);
  out.row = row_of_tokens(batch, out.rows);
  out.weight = batch.response_mask.to(dtype, /*non_blocking=*/false, /*copy=*/true).reshape({-1});
  out.active = out.weight != 0;
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().to(dtype).reshape({-1});
    return at::where(out.active, values, at::zeros_like(values));
  };
  const bool per_row = batch.advantages.sizes() != batch.logps.sizes();
  out.logp = selected(batch.logps);
  out.old_logp = batch.old_logps.defined() ? selected(batch.old_logps) : out.logp;
  out.ref_logp = batch.ref_logps.defined() ? selected(batch.ref_logps) : at::zeros_like(out.logp);
  out.entropy = batch.entropies.defined() ? selected(batch.entropies) : at::zeros_like(out.logp);
  out.advantage =
      selected(per_row ? batch.advantages.select(1, 0).index_select(0, out.row) : batch.advantages);
  return out;
}

at::Tensor surrogate_of(const Surrogate& surrogate, const TensorToken& token) {
  if (surrogate.face_path()) {
    using Path = at::Tensor (*)(const Surrogate&, const TensorToken&);
    return reinterpret_cast<Path>(surrogate.face_path())(surrogate, token);
  }
  at::Tensor out;
  for_each_surrogate([&](auto formula) {
    if (!out.defined()) out = evaluate_on_tensors<decltype(formula)>(surrogate, token);
  });
  check_value(out.defined(),
              "policy_loss: surrogate must be one of the library's or wrapped by on_any_device on "
              "devices other than the CPU, got another type");
  return out;
}

// 1 / denominator of each row's terms, as row_factor (rl/aggregation.h), without a look at the
// values.
at::Tensor row_factors(const Aggregation& aggregation, const std::optional<double>& tokens,
                       const std::optional<double>& sequences, const at::Tensor& row_tokens) {
  const auto given = [&](const std::optional<double>& count, const at::Tensor& local) {
    return count ? at::scalar_tensor(*count, local.options()) : local;
  };
  const at::Tensor n = given(tokens, row_tokens.sum());
  const at::Tensor s = given(sequences, (row_tokens > 0).sum().to(row_tokens.scalar_type()));
  at::Tensor denominator;
  switch (aggregation.mode) {
    case Aggregation::Mode::token_mean:
      denominator = n.expand_as(row_tokens);
      break;
    case Aggregation::Mode::sequence_mean_token_mean:
      denominator = s * row_tokens;
      break;
    case Aggregation::Mode::sequence_mean_token_sum:
      denominator = s.expand_as(row_tokens);
      break;
    case Aggregation::Mode::sequence_sum_over_constant:
      denominator = (s * aggregation.constant).expand_as(row_tokens);
      break;
  }
  return at::where(denominator > 0, 1 / denominator, at::zeros_like(denominator));
}

// What the surrogate sees in place of the token's own logp and log-ratio (rl/ratio.h).
struct Levelled {
  at::Tensor logp, log_ratio;
};

Levelled levelled(RatioLevel level, const FlatBatch& batch, const at::Tensor& logp,
                  const at::Tensor& row_tokens) {
  const at::Tensor log_ratio = logp - batch.old_logp;
  if (level == RatioLevel::token) return {logp, log_ratio};
  const auto spread = [&](const at::Tensor& values) {
    at::Tensor sums = at::zeros({batch.rows}, batch.weight.options())
                          .index_add(0, batch.row, batch.weight * values);
    if (level != RatioLevel::sequence_sum) {
      sums = sums / at::where(row_tokens > 0, row_tokens, at::ones_like(row_tokens));
    }
    return sums.index_select(0, batch.row);
  };
  if (level == RatioLevel::sequence_token) {
    return {logp, log_ratio - log_ratio.detach() + spread(log_ratio).detach()};
  }
  return {spread(logp), spread(log_ratio)};
}

// The value and the gradient at each token of its penalty.
at::Tensor kl_of(const KlPenalty& penalty, const FlatBatch& batch, const at::Tensor& logp) {
  const bool wide = logp.scalar_type() == at::kDouble;
  return kl_term(penalty, TensorNumber{logp}, TensorNumber{logp - batch.old_logp},
                 TensorNumber{batch.ref_logp},
                 wide ? kWeightSaturation<double> : kWeightSaturation<float>)
      .value;
}

// Whether nothing about a token is NaN or infinite. A reference counts under a penalty.
at::Tensor finite_tokens(const FlatBatch& batch, const at::Tensor& log_ratio,
                         const at::Tensor& loss, const at::Tensor& dloss, const at::Tensor& kl,
                         bool penalty) {
  at::Tensor finite = at::isfinite(log_ratio);
  for (const at::Tensor& each :
       {batch.advantage, loss, dloss, kl, penalty ? batch.ref_logp : batch.advantage}) {
    finite = finite.logical_and(at::isfinite(each));
  }
  return finite;
}

// d value / d x; 0 where value does not depend on x, which torch takes for a mistake.
at::Tensor derivative(const at::Tensor& value, const at::Tensor& x) {
  if (!value.requires_grad()) return at::zeros_like(x);
  const at::Tensor slope = torch::autograd::grad({value}, {x}, {}, /*retain_graph=*/true,
                                                 /*create_graph=*/false, /*allow_unused=*/true)[0];
  return slope.defined() ? slope : at::zeros_like(x);
}

PolicyMetricTensors metrics_of(const FlatBatch& batch, const at::Tensor& d, const at::Tensor& loss,
                               const at::Tensor& dloss, const at::Tensor& kl,
                               const at::Tensor& finite) {
  using M = PolicyMetrics;
  const TensorNumber log_ratio{d};
  const at::Tensor ratio = exp(log_ratio).value;
  const at::Tensor stuck = dloss == 0;
  const at::Tensor bad = stuck.logical_and(batch.advantage < 0);
  const at::Tensor good = stuck.logical_and(batch.advantage > 0);
  const at::Tensor zero = at::zeros_like(d);
  const auto sum = [&](const at::Tensor& values) {
    return at::where(batch.active, batch.weight * values, zero).to(at::kDouble).sum();
  };
  std::vector<at::Tensor> sums(M::kSums);
  sums[M::kPolicyLoss] = sum(loss);
  sums[M::kKl] = sum(kl);
  sums[M::kEntropy] = sum(batch.entropy);
  sums[M::kClipFractionLow] = sum(bad.logical_and(d < 0));
  sums[M::kClipFractionHigh] = sum(good.logical_and(d > 0));
  sums[M::kClipFractionDual] = sum(bad.logical_and(d > 0));
  sums[M::kApproxKlK1] = sum(-d);
  sums[M::kApproxKlK3] = sum(k3(log_ratio).value);
  sums[M::kRatio] = sum(ratio);
  sums[M::kRatioSquared] = sum(ratio * ratio);
  sums[M::kNonfinite] = at::zeros({}, d.options().dtype(at::kDouble));
  for (const at::Tensor& sound : {finite, at::isfinite(batch.entropy)}) {
    sums[M::kNonfinite] += batch.active.logical_and(sound.logical_not()).to(at::kDouble).sum();
  }
  const at::Tensor count = batch.weight.to(at::kDouble).sum();
  const at::Tensor lowest = at::zeros({1}, d.options()) - M::kUnseen;
  const auto largest = [&](const at::Tensor& values) {
    const at::Tensor seen = at::where(batch.active.logical_and(finite), values, lowest);
    return at::cat({seen, lowest}).max().to(at::kDouble);
  };
  const at::Tensor values = at::stack(sums);
  return {.sums = at::stack({values, count.expand_as(values)}, 1),
          .maxima = at::stack({largest(d), largest(-d)})};
}

void check_needs(std::string_view function, const PolicyBatch& batch,
                 const PolicyObjective& objective) {
  const std::string name(function);
  check_value(objective.kl.beta == 0 || batch.ref_logps.defined(),
              name + ": ref_logps must be given when beta is greater than 0, got beta " +
                  text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0");
  const double entropy_coef = objective.entropy.coefficient;
  check_value(entropy_coef == 0 || batch.entropies.defined(),
              name + ": entropies must be given when entropy_coef is not 0, got entropy_coef " +
                  text(entropy_coef) + " and none. Pass entropies or entropy_coef = 0");
}

at::Tensor row_sums_of_weights(const FlatBatch& flat) {
  return at::zeros({flat.rows}, flat.weight.options()).index_add(0, flat.row, flat.weight);
}

}  // namespace

at::Tensor tensor_token_losses(const PolicyBatch& batch, const PolicyObjective& objective) {
  check_needs("policy_token_losses", batch, objective);
  FlatBatch flat = flattened(batch);
  const auto selected = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.to(flat.weight.scalar_type()).reshape({-1});
    return at::where(flat.active, values, at::zeros_like(values));
  };
  const at::Tensor logp = selected(batch.logps);
  const Levelled level = levelled(objective.level, flat, logp, row_sums_of_weights(flat));
  const TensorNumber log_ratio{level.log_ratio};
  const TensorToken token{{level.logp},     log_ratio,       exp(log_ratio),
                          {flat.advantage}, {flat.old_logp}, {flat.ref_logp}};
  const bool penalty = objective.kl.beta > 0;
  const at::Tensor loss = surrogate_of(objective.surrogate, token);
  const at::Tensor kl = penalty ? kl_of(objective.kl, flat, logp) : at::zeros_like(loss);
  const at::Tensor finite = finite_tokens(flat, level.log_ratio.detach(), loss.detach(),
                                          at::zeros_like(loss), kl.detach(), penalty);
  at::Tensor each = loss + kl * objective.kl.beta;
  if (objective.entropy.coefficient != 0) {
    each = each - selected(batch.entropies) * objective.entropy.coefficient;
  }
  each = each * at::where(finite, at::ones_like(loss), NAN);  // saturation hides it
  return at::where(flat.active, each, at::zeros_like(each)).view(batch.logps.sizes());
}

ComputedLoss tensor_policy_loss(const PolicyBatch& batch, const PolicyObjective& objective,
                                const Normalizer& normalizer, WantedGradients wanted) {
  const bool penalty = objective.kl.beta > 0;
  const double entropy_coef = objective.entropy.coefficient;
  check_needs("policy_loss", batch, objective);
  step_counts("policy_loss", normalizer, {});  // the counts of the batch are not waited for
  // Under the caller's inference mode there would be no gradient to take here.
  const c10::InferenceMode normal(false);
  FlatBatch flat = flattened(batch);
  const at::Tensor n = row_sums_of_weights(flat);

  // The gradient is taken here, with the loss, so that backward is a scaling as on the CPU.
  at::AutoGradMode enabled(true);
  const at::Tensor logp = flat.logp.detach().requires_grad_(true);
  const at::Tensor entropy = flat.entropy.detach().requires_grad_(true);
  // 0, and what the surrogate's own slope d S / d L is the derivative by.
  const at::Tensor step = at::zeros_like(logp).requires_grad_(true);
  const Levelled level = levelled(objective.level, flat, logp, n);
  const TensorNumber log_ratio{level.log_ratio + step};
  const TensorToken token{{level.logp + step}, log_ratio,       exp(log_ratio),
                          {flat.advantage},    {flat.old_logp}, {flat.ref_logp}};
  const at::Tensor loss = surrogate_of(objective.surrogate, token);
  const at::Tensor kl = penalty ? kl_of(objective.kl, flat, logp) : at::zeros_like(loss);
  const at::Tensor dloss = derivative(loss.sum(), step);
  const at::Tensor finite =
      finite_tokens(flat, level.log_ratio.detach(), loss.detach(), dloss, kl.detach(), penalty);
  const at::Tensor spoil = at::where(finite, at::ones_like(dloss), NAN);  // saturation hides it

  const auto& kl_tokens = normalizer.kl ? normalizer.kl : normalizer.policy;
  const auto total = [&](const at::Tensor& terms, const std::optional<double>& tokens) {
    const at::Tensor factor = row_factors(objective.aggregation, tokens, normalizer.sequences, n)
                                  .index_select(0, flat.row) *
                              normalizer.world_size;
    return at::where(flat.active, terms * spoil * flat.weight * factor, at::zeros_like(terms))
        .sum();
  };
  at::Tensor sum = total(loss, normalizer.policy);
  if (penalty) sum = sum + total(kl, kl_tokens) * objective.kl.beta;
  if (entropy_coef != 0) sum = sum - total(entropy, normalizer.policy) * entropy_coef;

  ComputedLoss out;
  if (wanted.logps) out.dlogps = derivative(sum, logp).view(batch.logps.sizes());
  if (wanted.entropies) out.dentropies = derivative(sum, entropy).view(batch.logps.sizes());
  at::AutoGradMode disabled(false);
  out.loss = sum.detach();
  out.metrics =
      metrics_of(flat, level.log_ratio.detach(), loss.detach(), dloss, kl.detach(), finite);
  return out;
}

}  // namespace tether::detail
