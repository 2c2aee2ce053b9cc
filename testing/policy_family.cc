#include <cmath>

#include "testing/policy_checks.h"
#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace policy;

Case one_token(double logp, double old_logp, double ref_logp, double advantage) {
  return {.rows = 1,
          .columns = 1,
          .response_mask = {1},
          .arrays = {{logp}, {old_logp}, {ref_logp}, {old_logp}, {0}, {advantage}}};
}

Case simplest() { return one_token(-1, -1.1, -1.5, 1); }

double advantage(Random& random) {
  switch (random.integer(0, 5)) {
    case 0:
      return 0;
    case 1:
      return 1;
    case 2:
      return random.uniform(-10, 10);
    default:
      return random.uniform(-2, 2);
  }
}

// Ragged rows of every kind, advantages with zeros among them. All numbers are float32.
Case drawn(Random& random, const LossTraits& traits, int64_t rows, int64_t columns) {
  Case out{.rows = rows, .columns = columns};
  out.arrays.resize(6);
  out.per_row = traits.takes_row_advantages && random.integer(0, 1) == 0;
  const bool fractional = traits.takes_fractional_mask && random.integer(0, 3) == 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> mask = random.row_mask(columns, fractional);
    out.response_mask.insert(out.response_mask.end(), mask.begin(), mask.end());
    const double shared = advantage(random);
    double turn = 0;
    for (int64_t column = 0; column < columns; ++column) {
      const double logp = static_cast<float>(-random.uniform(0.05, 6));
      out[kLogps].push_back(logp);
      out[kOldLogps].push_back(static_cast<float>(logp - random.log_ratio()));
      out[kRefLogps].push_back(static_cast<float>(logp + random.log_ratio()));
      out[kRolloutLogps].push_back(static_cast<float>(logp + random.log_ratio()));
      turn += random.integer(0, 2) == 0 ? 1 : 0;
      out[kTurnIds].push_back(turn);
      out[kAdvantages].push_back(static_cast<float>(out.per_row ? shared : advantage(random)));
    }
  }
  return out;
}

std::vector<Case> bounds(const ClipRange& clip) {
  std::vector<Case> out;
  for (double bound : {1 - clip.low, 1 + clip.high}) {
    if (bound == infinity) continue;
    for (double ratio : {bound * 0.97, bound * 1.03}) {
      if (ratio <= 0) continue;
      for (double A : {-1.0, 1.0}) out.push_back(one_token(-1, -1 - std::log(ratio), -1, A));
    }
  }
  return out;
}

std::vector<Case> runaways() {
  std::vector<Case> out;
  for (double gap : {0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 3e38}) {
    for (double signed_gap : {gap, -gap}) {
      for (double A : {1.0, -1.0, 0.0, -0.0, 1e4, -1e4, 1e12, -1e12}) {
        out.push_back(one_token(-1, -1 - signed_gap, -1, A));
      }
      out.push_back(one_token(-1, -1, -1 - signed_gap, 0));
    }
  }
  return out;
}

// Values with the advantages -(|A| + 1) and |A| + 1.
Observed magnitude(const Probe& probe, const Case& batch, const Normalizer& step) {
  const Probe wide = probe.reference();
  Case good = batch, bad = batch;
  for (size_t i = 0; i < batch.size(); ++i) {
    good[kAdvantages][i] = std::fabs(batch[kAdvantages][i]) + 1;
    bad[kAdvantages][i] = -good[kAdvantages][i];
  }
  const Observed a = wide(good, {.normalizer = step}), b = wide(bad, {.normalizer = step});
  Observed out{
      .loss = std::fabs(a.loss) + std::fabs(b.loss), .gradient = a.gradient, .metrics = {}};
  for (size_t i = 0; i < batch.size(); ++i) {
    out.gradient[i] = std::fabs(a.gradient[i]) + std::fabs(b.gradient[i]);
  }
  return out;
}

PolicyBatch batch_of(const Tensors& tensors, const LossTraits& traits) {
  PolicyBatch out;
  out.logps = tensors.arrays[kLogps];
  out.old_logps = tensors.arrays[kOldLogps];
  if (traits.needs_ref_logps) out.ref_logps = tensors.arrays[kRefLogps];
  if (traits.needs_rollout_logps) out.rollout_logps = tensors.arrays[kRolloutLogps];
  if (traits.needs_turn_ids) out.turn_ids = tensors.arrays[kTurnIds].to(at::kLong);
  out.advantages = tensors.arrays[kAdvantages];
  out.response_mask = tensors.response_mask;
  out.offsets = tensors.offsets;
  // Rows of one token each: one number a row is one a token.
  const at::Tensor& advantages = out.advantages;
  const bool twofold = out.offsets.defined() && advantages.dim() == 1 &&
                       advantages.numel() == out.logps.numel() &&
                       advantages.numel() == out.offsets.numel() - 1;
  if (twofold) out.advantages = advantages.unsqueeze(1);
  return out;
}

Loss loss_of(const PolicyLoss& loss, const LossTraits& traits) {
  if (!loss) return {};
  return [loss, &traits](const Tensors& tensors, const Normalizer& step) {
    return loss(batch_of(tensors, traits), step);
  };
}

const Family kPolicy{
    .batch = "tether::PolicyBatch",
    .arrays = {"logps", "old_logps", "ref_logps", "rollout_logps", "turn_ids", "advantages"},
    .free_array = kAdvantages,
    .id_array = kTurnIds,
    .simplest = simplest,
    .drawn = drawn,
    .bounds = bounds,
    .runaways = runaways,
    .magnitude = magnitude,
    .properties = policy_properties};

}  // namespace

PolicyReport check_policy_loss(const PolicyLoss& loss, const PolicyTraits& traits,
                               const CheckOptions& options) {
  Subject subject{.family = kPolicy,
                  .traits = traits,
                  .loss = loss_of(loss, traits),
                  .reference = loss_of(traits.reference, traits)};
  if (traits.counts) {
    subject.counts = [&](const Tensors& tensors) {
      return traits.counts(batch_of(tensors, traits));
    };
  }
  return check(subject, options);
}

}  // namespace tether::testing
