#include "testing/preference_checks.h"
#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace preference;

// Answers of one token each, with these log-ratios.
Case one_pair(double chosen, double rejected) {
  return {.rows = 2,
          .columns = 1,
          .pairs = true,
          .response_mask = {1, 1},
          .arrays = {{-1, -2}, {-1 - chosen, -2 - rejected}}};
}

Case simplest() { return one_pair(0.5, -0.25); }

// Ragged answers of every kind. All numbers are float32.
Case drawn(Random& random, const LossTraits& traits, int64_t pairs, int64_t columns) {
  Case out{.rows = 2 * pairs, .columns = columns, .pairs = true};
  out.arrays.resize(2);
  const bool fractional = traits.takes_fractional_mask && random.integer(0, 3) == 0;
  for (int64_t row = 0; row < 2 * pairs; ++row) {
    const std::vector<double> mask = random.row_mask(columns, fractional);
    out.response_mask.insert(out.response_mask.end(), mask.begin(), mask.end());
    for (int64_t column = 0; column < columns; ++column) {
      const double logp = static_cast<float>(-random.uniform(0.05, 6));
      out[kLogps].push_back(logp);
      out[kRefLogps].push_back(static_cast<float>(logp + random.log_ratio()));
    }
  }
  return out;
}

std::vector<Case> bounds(const ClipRange&) { return {}; }

std::vector<Case> runaways() {
  std::vector<Case> out;
  for (double gap : {0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 1e6, 1e15}) {
    for (double chosen : {gap, -gap}) {
      out.push_back(one_pair(chosen, 0));
      out.push_back(one_pair(chosen, -chosen));
      out.push_back(one_pair(0, chosen));
    }
  }
  return out;
}

PreferenceBatch batch_of(const Tensors& tensors, const LossTraits& traits) {
  PreferenceBatch out;
  out.logps = tensors.arrays[kLogps];
  if (traits.needs_ref_logps) out.ref_logps = tensors.arrays[kRefLogps];
  out.response_mask = tensors.response_mask;
  out.offsets = tensors.offsets;
  return out;
}

const Family kPreference{.batch = "tether::PreferenceBatch",
                         .arrays = {"logps", "ref_logps"},
                         .free_array = kNoArray,
                         .id_array = kNoArray,
                         .simplest = simplest,
                         .drawn = drawn,
                         .bounds = bounds,
                         .runaways = runaways,
                         .magnitude = magnitude_by_moving,
                         .properties = preference_properties};

}  // namespace

Report check_preference_loss(const PreferenceLoss& loss, const LossTraits& traits,
                             const CheckOptions& options) {
  const auto call = [&](const Tensors& tensors, const Normalizer& step) {
    PairNormalizer pairs;
    pairs.pairs = step.sequences;
    pairs.world_size = step.world_size;
    pairs.scale = step.scale;
    return loss(batch_of(tensors, traits), pairs);
  };
  return check({.family = kPreference, .traits = traits, .loss = call}, options);
}

LossTraits traits_of(const PreferenceObjective& objective) {
  const Traits& formula = objective.loss.traits();
  return {.takes_offsets = true,
          .needs_ref_logps = objective.reference,
          .is_function_of_log_ratio = objective.reference && formula.of_log_ratio,
          .gradient_is_derivative = !formula.stops_gradient,
          .pulls_back = formula.pulls_back && objective.link.traits().pulls_back,
          .bitwise = true,
          .refuses_double_backward = true};
}

}  // namespace tether::testing
