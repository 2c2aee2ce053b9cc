#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "testing/policy_properties.h"

namespace tether::testing {
namespace {

// Without the penalty: the policy is at its reference.
PolicyCase at_reference(PolicyCase batch) {
  batch.ref_logps = batch.logps;
  return batch;
}

PolicyCase scaled_advantages(PolicyCase batch, double scale) {
  for (double& advantage : batch.advantages) advantage *= scale;
  return batch;
}

Failure check_reference_value(const Probe& probe, const PolicyCase& batch) {
  return probe.close_losses("beside the reference", probe(batch).loss, probe.reference(batch).loss,
                            probe.magnitude(batch));
}

Failure check_reference_gradient(const Probe& probe, const PolicyCase& batch) {
  return probe.close_gradients("beside the reference", probe(batch).gradient,
                               probe.reference(batch).gradient, probe.magnitude(batch));
}

// The largest |log_ratio| that the loss may take for one of the row of slot i.
double largest_log_ratio(const Probe& probe, const PolicyCase& batch, size_t i) {
  if (probe.traits.is_per_token) return std::fabs(batch.log_ratio(i));
  double sum = 0;
  const auto columns = static_cast<size_t>(batch.columns);
  for (size_t j = i - i % columns; j < i - i % columns + columns; ++j) {
    if (batch.active(j)) sum += std::fabs(batch.log_ratio(j));
  }
  return sum;
}

// Metrics are means over tokens of terms up to |A| e^log_ratio.
Failure check_reference_metrics(const Probe& probe, const PolicyCase& batch) {
  double largest = 1;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!batch.active(i)) continue;
    const double ratio = std::exp(largest_log_ratio(probe, batch, i));
    largest = std::max(largest, ratio * std::max(ratio, std::fabs(batch.advantages[i])));
  }
  const double bound = probe.traits.tolerance * probe.epsilon() * largest;
  const Observed got = probe(batch), want = probe.reference(batch);
  for (const auto& [name, value] : want.metrics) {
    const auto found = got.metrics.find(name);
    if (found == got.metrics.end() || std::fabs(found->second - value) <= bound) continue;
    return "metric " + name + " " + changed(value, found->second);
  }
  return {};
}

// Tokens at a kink, where the one-sided differences disagree, are passed over.
Failure check_finite_difference(const Probe& probe, const PolicyCase& batch) {
  if (probe.dtype != at::kDouble) return {};
  constexpr double h = 1e-5;
  const Observed at = probe(batch), magnitude = probe.magnitude(batch);
  const auto moved = [&](size_t i, double by) {
    PolicyCase other = batch;
    other.logps[i] += by;
    return probe(other).loss;
  };
  for (size_t i = 0; i < std::min<size_t>(batch.size(), 24); ++i) {
    if (!batch.active(i)) continue;
    const double up = (moved(i, h) - at.loss) / h, down = (at.loss - moved(i, -h)) / h;
    const double noise = 1e-9 * magnitude.loss + 1e-6 * magnitude.gradient[i];
    if (std::fabs(up - down) > 1e-3 * (std::fabs(up) + std::fabs(down)) + noise) continue;
    if (std::fabs(at.gradient[i] - (up + down) / 2) <= noise) continue;
    return "gradient at " + place(batch, i) + " " + changed((up + down) / 2, at.gradient[i]);
  }
  return {};
}

std::vector<double> times(std::vector<double> values, double factor) {
  for (double& value : values) value *= factor;
  return values;
}

Failure check_upstream(const Probe& probe, const PolicyCase& batch) {
  const Observed one = probe(batch), magnitude = probe.magnitude(batch);
  for (double upstream : {-1.0, 2.0, 0.0, 0.37}) {
    const PolicyBatch tensors = probe.tensors(batch);
    const at::Tensor loss = probe.forward(tensors).loss;
    const std::vector<double> got =
        to_vector(gradient_of(loss, tensors.logps, at::full_like(loss, upstream)));
    const std::string what = "upstream gradient " + text(upstream);
    if (Failure failure =
            probe.close_gradients(what, got, times(one.gradient, upstream), magnitude)) {
      return failure;
    }
  }
  PolicyCase other = batch;
  for (double& advantage : other.advantages) advantage = 1 - advantage;
  const PolicyBatch tensors = probe.tensors(batch);
  PolicyBatch second = probe.tensors(other);
  second.logps = tensors.logps;
  const at::Tensor sum = 3 * probe.forward(tensors).loss - 0.5 * probe.forward(second).loss;
  const std::vector<double> got = to_vector(gradient_of(sum, tensors.logps));
  std::vector<double> want = probe(other).gradient;
  for (size_t i = 0; i < want.size(); ++i) want[i] = 3 * one.gradient[i] - 0.5 * want[i];
  Observed wider = magnitude;
  wider.gradient = times(magnitude.gradient, 5);
  return probe.close_gradients("3 loss - 0.5 loss of other advantages", got, want, wider);
}

Failure check_double_backward(const Probe& probe, const PolicyCase& batch) {
  const PolicyBatch tensors = probe.tensors(batch);
  const at::Tensor loss = probe.forward(tensors).loss;
  try {
    const at::Tensor first =
        torch::autograd::grad({loss}, {tensors.logps}, {}, true, /*create_graph=*/true)[0];
    torch::autograd::grad({first.sum()}, {tensors.logps}, {}, false, false, /*allow_unused=*/true);
  } catch (const std::exception&) {
    return {};
  }
  return "a second derivative was given, not refused";
}

Failure check_finite(const Probe& probe, const PolicyCase& batch) {
  const Observed got = probe(batch);
  if (!std::isfinite(got.loss)) return "loss " + text(got.loss);
  for (size_t i = 0; i < got.gradient.size(); ++i) {
    if (std::isfinite(got.gradient[i])) continue;
    return "gradient at " + place(batch, i) + " " + text(got.gradient[i]) + ", loss " +
           text(got.loss);
  }
  return {};
}

// Too likely and bad, by whatever margin: the gradient makes it rarer.
Failure check_pull_back(const Probe& probe, const PolicyCase& given) {
  const PolicyCase batch = at_reference(given);
  const Observed got = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!batch.active(i) || batch.advantages[i] >= 0 || batch.log_ratio(i) <= 0) continue;
    if (got.gradient[i] > 0) continue;
    return "advantage " + text(batch.advantages[i]) + ", log-ratio " + text(batch.log_ratio(i)) +
           ", and a gradient of " + text(got.gradient[i]) + " at " + place(batch, i);
  }
  return {};
}

Failure check_kl_pull(const Probe& probe, const PolicyCase& given) {
  PolicyCase batch = scaled_advantages(given, 0);
  batch.old_logps = batch.logps;
  const Observed got = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    const double gap = batch.logps[i] - batch.ref_logps[i];
    if (!batch.active(i) || std::fabs(gap) < 1e-3) continue;
    if (!probe.traits.survives_runaways && std::fabs(gap) > 20) continue;
    if (got.gradient[i] * gap > 0) continue;
    return "logp - ref_logp " + text(gap) + ", and a gradient of " + text(got.gradient[i]) +
           " at " + place(batch, i);
  }
  return {};
}

Failure check_clip(const Probe& probe, const PolicyCase& given) {
  const PolicyCase batch = at_reference(given);
  const Observed got = probe(batch);
  const double low = 1 - probe.traits.clip->low, high = 1 + probe.traits.clip->high;
  for (size_t i = 0; i < batch.size(); ++i) {
    const double ratio = std::exp(batch.log_ratio(i)), A = batch.advantages[i];
    const bool at_bound = std::fabs(ratio - low) < 1e-3 || std::fabs(ratio - high) < 1e-3;
    if (!batch.active(i) || at_bound) continue;
    const bool bad = A < 0 && (ratio < low || ratio > probe.traits.clip->dual);
    const bool clipped = A == 0 || (A > 0 && ratio > high) || bad;
    if (clipped == (got.gradient[i] == 0)) continue;
    return "advantage " + text(A) + ", ratio " + text(ratio) + ", and a gradient of " +
           text(got.gradient[i]) + " at " + place(batch, i);
  }
  return {};
}

// One advantage for all tokens of a row.
PolicyCase with_row_advantages(PolicyCase batch) {
  for (size_t i = 0; i < batch.size(); ++i) {
    batch.advantages[i] = batch.advantages[i - i % static_cast<size_t>(batch.columns)];
  }
  return batch;
}

// The ratio is 1 and the reference is the policy: what is left is -A times the token's weight,
// which is the gradient for A = 1.
Failure check_on_policy(const Probe& probe, const PolicyCase& given) {
  PolicyCase batch = at_reference(given);
  if (!probe.traits.is_per_token) batch = with_row_advantages(batch);
  batch.old_logps = batch.logps;
  PolicyCase ones = batch;
  std::fill(ones.advantages.begin(), ones.advantages.end(), 1);
  const Observed got = probe(batch);
  std::vector<double> want = probe(ones).gradient;
  for (size_t i = 0; i < want.size(); ++i) {
    if (batch.active(i) && !(want[i] < 0)) {
      return "advantage 1 and a gradient of " + text(want[i]) + " at " + place(batch, i);
    }
    want[i] *= batch.advantages[i];
  }
  if (Failure failure = probe.close_gradients("beside A times the gradient for A = 1", got.gradient,
                                              want, probe.magnitude(batch))) {
    return failure;
  }
  if (!probe.traits.takes_no_old_logps) return {};
  return probe.same("without old_logps", probe(batch, {.without_old_logps = true}), got);
}

Failure check_advantage_scale(const Probe& probe, const PolicyCase& given) {
  const PolicyCase batch = at_reference(given);
  for (double scale : {8.0, 0.25}) {
    Observed want = probe(batch);
    want.loss *= scale;
    want.gradient = times(want.gradient, scale);
    want.metrics.clear();
    const std::string what = "advantages times " + text(scale);
    if (Failure failure = probe.same(what, probe(scaled_advantages(batch, scale)), want)) {
      return failure;
    }
  }
  return {};
}

// On a grid on which every difference is exact.
Failure check_shift(const Probe& probe, const PolicyCase& given) {
  PolicyCase batch = given, shifted = given;
  for (auto array : {&PolicyCase::logps, &PolicyCase::old_logps, &PolicyCase::ref_logps}) {
    for (size_t i = 0; i < batch.size(); ++i) {
      (batch.*array)[i] = std::round((batch.*array)[i] * 256) / 256;
      (shifted.*array)[i] = (batch.*array)[i] - 4;
    }
  }
  return probe.same("all log-probabilities lowered by 4", probe(shifted), probe(batch));
}

std::string_view needs_reference(const PolicyTraits& traits) {
  return traits.reference ? "" : "no reference given";
}
std::string_view needs_derivative(const PolicyTraits& traits) {
  if (!traits.gradient_is_derivative) return "the gradient is not the derivative of the value";
  const auto& types = traits.dtypes;
  const bool wide = std::find(types.begin(), types.end(), at::kDouble) != types.end();
  return wide ? "" : "the loss takes no float64";
}
std::string_view needs_refusal(const PolicyTraits& traits) {
  return traits.refuses_double_backward ? "" : "the loss may have a second derivative";
}
std::string_view needs_survival(const PolicyTraits& traits) {
  return traits.survives_runaways ? "" : "the loss promises nothing for a token that ran away";
}
std::string_view needs_pull(const PolicyTraits& traits) {
  if (!traits.pulls_back) return "the loss does not promise it for each token";
  return needs_survival(traits);
}
std::string_view needs_penalty(const PolicyTraits& traits) {
  if (!traits.needs_ref_logps) return "the loss has no KL penalty";
  return traits.penalty_pulls ? "" : "the loss does not promise it for each token";
}
std::string_view needs_clip(const PolicyTraits& traits) {
  return traits.clip ? "" : "the loss does not clip";
}
std::string_view needs_scaling(const PolicyTraits& traits) {
  return traits.scales_with_advantages ? "" : "the loss is not proportional to the advantages";
}
std::string_view needs_log_ratio(const PolicyTraits& traits) {
  return traits.is_function_of_log_ratio ? "" : "the loss is not a function of log-ratios";
}

constexpr Property kProperties[] = {
    {"reference_value", "The value is the reference's, to rounding", Batches::shaped,
     needs_reference, check_reference_value},
    {"reference_gradient", "The gradient is the reference's, to rounding", Batches::shaped,
     needs_reference, check_reference_gradient},
    {"reference_metrics", "Metrics are the reference's of the same name, to rounding",
     Batches::shaped, needs_reference, check_reference_metrics},
    {"finite_difference", "The gradient is the central difference of the value, away from kinks",
     Batches::small, needs_derivative, check_finite_difference},
    {"upstream", "The gradient is linear in the upstream gradient", Batches::small, never,
     check_upstream},
    {"double_backward", "A second derivative is refused", Batches::small, needs_refusal,
     check_double_backward},
    {"finite", "No finite log-ratio or advantage gives a NaN or infinity", Batches::runaways,
     needs_survival, check_finite},
    {"pull_back", "A token that became too likely and is bad has a gradient that makes it rarer",
     Batches::runaways, needs_pull, check_pull_back},
    {"kl_pull", "The penalty's gradient pulls to the reference from every distance",
     Batches::runaways, needs_penalty, check_kl_pull},
    {"clip", "The gradient is 0 exactly where the ratio is beyond the clip range, or A = 0",
     Batches::bounds, needs_clip, check_clip},
    {"on_policy", "With the ratio at 1 and no penalty the gradient is -A times the token's weight",
     Batches::small, never, check_on_policy},
    {"advantage_scale", "Advantages times a power of two give loss and gradient times it, exactly",
     Batches::small, needs_scaling, check_advantage_scale},
    {"shift", "A constant added to all log-probabilities changes nothing", Batches::small,
     needs_log_ratio, check_shift},
};

}  // namespace

std::span<const Property> formula_properties() { return kProperties; }

}  // namespace tether::testing
