#include "testing/policy_checks.h"

namespace tether::testing {
namespace {

double option_of(const Surrogate& surrogate, std::string_view name) {
  double out = infinity;
  surrogate.for_each_field([&](std::string_view each, double value, const Range&) {
    if (each == name) out = value;
  });
  return out;
}

}  // namespace

PolicyTraits traits_of(const PolicyObjective& objective) {
  const Traits& formula = objective.surrogate.traits();
  PolicyTraits out{.takes_offsets = true,
                   .takes_row_advantages = true,
                   .takes_no_old_logps = true,
                   .needs_ref_logps = objective.kl.needs(KlReference::reference),
                   .needs_turn_ids = rule_of(objective.level).segment == Segment::turn,
                   .is_function_of_log_ratio = formula.of_log_ratio,
                   .scales_with_advantages = formula.homogeneous,
                   .is_per_token = is_per_token(objective),
                   .gradient_is_derivative =
                       !formula.stops_gradient &&
                       (objective.level == RatioLevel::token || shares_ratio(objective.level)),
                   .bitwise = true,
                   .refuses_double_backward = true};
  out.needs_rollout_logps = objective.kl.needs(KlReference::rollout);
  // A penalty that ties to the old policy adds to the surrogate at every ratio but 1.
  const bool tied = objective.kl.beta > 0 && !out.needs_ref_logps;
  out.scales_with_advantages &= !tied;
  ClipRange clip{.low = infinity, .high = infinity};  // a gradient at every ratio
  if (formula.clips) {
    clip = {.low = option_of(objective.surrogate, "epsilon_low"),
            .high = option_of(objective.surrogate, "epsilon_high"),
            .dual = option_of(objective.surrogate, "dual_clip")};
  }
  for (const auto& [weight, level] : objective.weights) {
    const Traits& of_weight = weight.traits();
    out.needs_ref_logps |= of_weight.needs_ref_logps;
    out.needs_rollout_logps |= of_weight.needs_rollout_logps;
    out.needs_turn_ids |= rule_of(level).segment == Segment::turn;
    out.stops_tokens = true;
    out.is_function_of_log_ratio &= of_weight.of_log_ratio;
    if (of_weight.leaves) {
      out.takes_tokens_out = true;
      out.takes_no_old_logps = false;
      out.is_per_token &= level == WeightLevel::token;
    }
    if (!of_weight.reads_policy) continue;
    // It moves with logp, and W is held.
    out.gradient_is_derivative = out.is_function_of_log_ratio = false;
  }
  out.stops_tokens |= clips_log_ratios(objective);
  out.pulls_back =
      formula.pulls_back && !out.stops_tokens && out.is_per_token && clip.dual == infinity && !tied;
  const bool clips = formula.clips || (formula.homogeneous && !formula.clips_both_sides);
  if (out.is_per_token && !out.stops_tokens && clips && !tied) out.clip = clip;
  out.reference = reference_of(objective);
  out.counts = [objective](const PolicyBatch& batch) { return local_counts(batch, objective); };
  return out;
}

}  // namespace tether::testing
