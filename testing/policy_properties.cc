#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace policy;

double log_ratio(const Case& batch, size_t i) { return batch[kLogps][i] - batch[kOldLogps][i]; }

// Without the penalty: the policy is at its reference.
Case at_reference(Case batch) {
  batch[kRefLogps] = batch[kLogps];
  return batch;
}

Case scaled_advantages(Case batch, double scale) {
  for (double& advantage : batch[kAdvantages]) advantage *= scale;
  return batch;
}

Failure check_reference_value(const Probe& probe, const Case& batch) {
  return probe.close_losses("beside the reference", probe(batch).loss,
                            probe.reference()(batch).loss, probe.magnitude(batch));
}

Failure check_reference_gradient(const Probe& probe, const Case& batch) {
  return probe.close_gradients("beside the reference", probe(batch).gradient,
                               probe.reference()(batch).gradient, probe.magnitude(batch));
}

// The largest |log_ratio| that the loss may take for one of the row of slot i.
double largest_log_ratio(const Probe& probe, const Case& batch, size_t i) {
  if (probe.traits.is_per_token) return std::fabs(log_ratio(batch, i));
  double sum = 0;
  const auto columns = static_cast<size_t>(batch.columns);
  for (size_t j = i - i % columns; j < i - i % columns + columns; ++j) {
    if (batch.active(j)) sum += std::fabs(log_ratio(batch, j));
  }
  return sum;
}

// Metrics are means over tokens of terms up to |A| e^log_ratio.
Failure check_reference_metrics(const Probe& probe, const Case& batch) {
  double largest = 1;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!batch.active(i)) continue;
    const double ratio = std::exp(largest_log_ratio(probe, batch, i));
    largest = std::max(largest, ratio * std::max(ratio, std::fabs(batch[kAdvantages][i])));
  }
  const double bound = probe.traits.tolerance * probe.epsilon() * largest;
  const Observed got = probe(batch), want = probe.reference()(batch);
  for (const auto& [name, value] : want.metrics) {
    const auto found = got.metrics.find(name);
    if (found == got.metrics.end() || std::fabs(found->second - value) <= bound) continue;
    return "metric " + name + " " + changed(value, found->second);
  }
  return {};
}

// Too likely and bad, by whatever margin: the gradient makes it rarer.
Failure check_pull_back(const Probe& probe, const Case& given) {
  const Case batch = at_reference(given);
  const Observed got = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    if (!batch.active(i) || batch[kAdvantages][i] >= 0 || log_ratio(batch, i) <= 0) continue;
    if (got.gradient[i] > 0) continue;
    return "advantage " + text(batch[kAdvantages][i]) + ", log-ratio " + text(log_ratio(batch, i)) +
           ", and a gradient of " + text(got.gradient[i]) + " at " + place(batch, i);
  }
  return {};
}

Failure check_kl_pull(const Probe& probe, const Case& given) {
  Case batch = scaled_advantages(given, 0);
  batch[kOldLogps] = batch[kLogps];
  const Observed got = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    const double gap = batch[kLogps][i] - batch[kRefLogps][i];
    if (!batch.active(i) || std::fabs(gap) < 1e-3) continue;
    if (!probe.traits.survives_runaways && std::fabs(gap) > 20) continue;
    if (got.gradient[i] * gap > 0) continue;
    return "logp - ref_logp " + text(gap) + ", and a gradient of " + text(got.gradient[i]) +
           " at " + place(batch, i);
  }
  return {};
}

Failure check_clip(const Probe& probe, const Case& given) {
  const Case batch = at_reference(given);
  const Observed got = probe(batch);
  const double low = 1 - probe.traits.clip->low, high = 1 + probe.traits.clip->high;
  for (size_t i = 0; i < batch.size(); ++i) {
    const double ratio = std::exp(log_ratio(batch, i)), A = batch[kAdvantages][i];
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
Case with_row_advantages(Case batch) {
  for (size_t i = 0; i < batch.size(); ++i) {
    batch[kAdvantages][i] = batch[kAdvantages][i - i % static_cast<size_t>(batch.columns)];
  }
  return batch;
}

// The ratio is 1 and the reference is the policy: what is left is -A times the token's weight,
// which is the gradient for A = 1.
Failure check_on_policy(const Probe& probe, const Case& given) {
  Case batch = at_reference(given);
  if (!probe.traits.is_per_token) batch = with_row_advantages(batch);
  batch[kOldLogps] = batch[kLogps];
  Case ones = batch;
  std::fill(ones[kAdvantages].begin(), ones[kAdvantages].end(), 1);
  const Observed got = probe(batch);
  std::vector<double> want = probe(ones).gradient;
  for (size_t i = 0; i < want.size(); ++i) {
    if (batch.active(i) && !(want[i] < 0)) {
      return "advantage 1 and a gradient of " + text(want[i]) + " at " + place(batch, i);
    }
    want[i] *= batch[kAdvantages][i];
  }
  if (Failure failure = probe.close_gradients("beside A times the gradient for A = 1", got.gradient,
                                              want, probe.magnitude(batch))) {
    return failure;
  }
  if (!probe.traits.takes_no_old_logps) return {};
  return probe.same("without old_logps", probe(batch, {.without = kOldLogps}), got);
}

Failure check_advantage_scale(const Probe& probe, const Case& given) {
  const Case batch = at_reference(given);
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
Failure check_shift(const Probe& probe, const Case& given) {
  Case batch = given, shifted = given;
  for (size_t array : {kLogps, kOldLogps, kRefLogps, kRolloutLogps}) {
    for (size_t i = 0; i < batch.size(); ++i) {
      batch[array][i] = std::round(batch[array][i] * 256) / 256;
      shifted[array][i] = batch[array][i] - 4;
    }
  }
  return probe.same("all log-probabilities lowered by 4", probe(shifted), probe(batch));
}

std::string_view needs_reference(const Subject& subject) {
  return subject.reference ? "" : "no reference given";
}
std::string_view needs_tokens(const Subject& subject) {
  return subject.traits.stops_tokens ? "weights may stop a token" : "";
}
std::string_view needs_penalty(const Subject& subject) {
  if (subject.traits.takes_tokens_out) return "weights may take a token out";
  if (!subject.traits.needs_ref_logps) return "the loss has no KL penalty";
  return subject.traits.penalty_pulls ? "" : "the loss does not promise it for each token";
}
std::string_view needs_scaling(const Subject& subject) {
  return subject.traits.scales_with_advantages ? ""
                                               : "the loss is not proportional to the advantages";
}
std::string_view needs_log_ratio(const Subject& subject) {
  return subject.traits.is_function_of_log_ratio ? "" : "the loss is not a function of log-ratios";
}

constexpr Property kProperties[] = {
    {"reference_value", "The value is the reference's, to rounding", Batches::shaped,
     needs_reference, check_reference_value},
    {"reference_gradient", "The gradient is the reference's, to rounding", Batches::shaped,
     needs_reference, check_reference_gradient},
    {"reference_metrics", "Metrics are the reference's of the same name, to rounding",
     Batches::shaped, needs_reference, check_reference_metrics},
    {"pull_back", "A token that became too likely and is bad has a gradient that makes it rarer",
     Batches::runaways, needs_pull, check_pull_back},
    {"kl_pull", "The penalty's gradient pulls to the reference from every distance",
     Batches::runaways, needs_penalty, check_kl_pull},
    {"clip", "The gradient is 0 exactly where the ratio is beyond the clip range, or A = 0",
     Batches::bounds, needs_clip, check_clip},
    {"on_policy", "With the ratio at 1 and no penalty the gradient is -A times the token's weight",
     Batches::small, needs_tokens, check_on_policy},
    {"advantage_scale", "Advantages times a power of two give loss and gradient times it, exactly",
     Batches::small, needs_scaling, check_advantage_scale},
    {"shift", "A constant added to all log-probabilities changes nothing", Batches::small,
     needs_log_ratio, check_shift},
};

}  // namespace

std::span<const Property> policy_properties() { return kProperties; }

}  // namespace tether::testing
