#include "testing/properties.h"
#include "testing/value_checks.h"

namespace tether::testing {
namespace {

using namespace value;

Case one_token(double value, double old_value, double target) {
  return {
      .rows = 1, .columns = 1, .response_mask = {1}, .arrays = {{value}, {old_value}, {target}}};
}

Case simplest() { return one_token(1, 0.9, 2.5); }

// Ragged rows of every kind. All numbers are float32.
Case drawn(Random& random, const LossTraits& traits, int64_t rows, int64_t columns) {
  Case out{.rows = rows, .columns = columns};
  out.arrays.resize(3);
  const bool fractional = traits.takes_fractional_mask && random.integer(0, 3) == 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> mask = random.row_mask(columns, fractional);
    out.response_mask.insert(out.response_mask.end(), mask.begin(), mask.end());
    for (int64_t column = 0; column < columns; ++column) {
      const double each = static_cast<float>(random.uniform(-2, 2));
      out[kValues].push_back(each);
      out[kOldValues].push_back(static_cast<float>(each + random.log_ratio()));
      out[kReturns].push_back(static_cast<float>(random.uniform(-2, 2)));
    }
  }
  return out;
}

// On either side of a bound, with the return on either side of both.
std::vector<Case> bounds(const ClipRange& clip) {
  std::vector<Case> out;
  for (double bound : {-clip.low, clip.high}) {
    if (bound == infinity || bound == -infinity) continue;
    for (double off : {bound * 0.97, bound * 1.03}) {
      for (double target : {-10.0, 10.0}) out.push_back(one_token(1 + off, 1, target));
    }
  }
  return out;
}

std::vector<Case> runaways() {
  std::vector<Case> out;
  for (double gap : {0.0, 1e-30, 1e-8, 1e-3, 1.0, 88.0, 1e3, 1e6, 1e18}) {
    for (double signed_gap : {gap, -gap}) {
      for (double old_value : {0.0, signed_gap}) {
        out.push_back(one_token(signed_gap, old_value, 1));
        out.push_back(one_token(1, old_value, signed_gap));
      }
    }
  }
  return out;
}

const Family kValue{.batch = "tether::ValueBatch",
                    .arrays = {"values", "old_values", "returns"},
                    .free_array = kReturns,
                    .id_array = kNoArray,
                    .simplest = simplest,
                    .drawn = drawn,
                    .bounds = bounds,
                    .runaways = runaways,
                    .magnitude = magnitude_by_moving,
                    .properties = value_properties};

}  // namespace

Report check_value_loss(const ValueLoss& loss, const LossTraits& traits,
                        const CheckOptions& options) {
  const auto call = [&](const Tensors& tensors, const Normalizer& step) {
    ValueBatch batch;
    batch.values = tensors.arrays[kValues];
    batch.old_values = tensors.arrays[kOldValues];
    batch.returns = tensors.arrays[kReturns];
    batch.response_mask = tensors.response_mask;
    batch.offsets = tensors.offsets;
    return loss(batch, step);
  };
  return check({.family = kValue, .traits = traits, .loss = call}, options);
}

LossTraits traits_of(const ValueObjective& objective) {
  const Traits& formula = objective.loss.traits();
  LossTraits out{.takes_offsets = true,
                 .gradient_is_derivative = !formula.stops_gradient,
                 .pulls_back = formula.pulls_back,
                 .bitwise = true,
                 .refuses_double_backward = true};
  if (formula.clips) {
    objective.loss.for_each_field([&](std::string_view name, double value, const Range&) {
      if (name == "clip_range") out.clip = ClipRange{.low = value, .high = value};
    });
  }
  return out;
}

}  // namespace tether::testing
