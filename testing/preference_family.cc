#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "testing/preference_checks.h"
#include "testing/probe.h"
#include "testing/properties.h"

namespace tether::testing {
namespace {

using namespace preference;

// Answers of one token each, with these log-ratios: a pair, or as labelled ones good and bad.
Case two_answers(double first, double second, bool pairs) {
  return {.rows = 2,
          .columns = 1,
          .pairs = pairs,
          .response_mask = {1, 1},
          .arrays = {{-1, -2}, {-1 - first, -2 - second}, {0, 0}, {1, 1}, {1, 0}}};
}

Case simplest() { return two_answers(0.5, -0.25, true); }
Case simplest_labelled() { return two_answers(0.5, -0.25, false); }

// Ragged answers of every kind. All numbers are float32.
Case drawn_rows(Random& random, const LossTraits& traits, int64_t rows, int64_t columns) {
  Case out{.rows = rows, .columns = columns};
  out.arrays.resize(5);
  const bool fractional = traits.takes_fractional_mask && random.integer(0, 3) == 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> mask = random.row_mask(columns, fractional);
    out.response_mask.insert(out.response_mask.end(), mask.begin(), mask.end());
    const double baseline = static_cast<float>(random.uniform(-1, 1));
    const double weight = 0.5 * static_cast<double>(random.integer(0, 4));
    const auto label = static_cast<double>(random.integer(0, 1));
    for (int64_t column = 0; column < columns; ++column) {
      const double logp = static_cast<float>(-random.uniform(0.05, 6));
      out[kLogps].push_back(logp);
      out[kRefLogps].push_back(static_cast<float>(logp + random.log_ratio()));
      out[kBaselines].push_back(baseline);
      out[kWeights].push_back(weight);
      out[kLabels].push_back(label);
    }
  }
  return out;
}

Case drawn(Random& random, const LossTraits& traits, int64_t pairs, int64_t columns) {
  Case out = drawn_rows(random, traits, 2 * pairs, columns);
  out.pairs = true;
  return out;
}

std::vector<Case> bounds(const ClipRange&) { return {}; }

std::vector<Case> runaways_of(bool pairs) {
  std::vector<Case> out;
  for (double gap : {0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 1e6, 1e15}) {
    for (double chosen : {gap, -gap}) {
      out.push_back(two_answers(chosen, 0, pairs));
      out.push_back(two_answers(chosen, -chosen, pairs));
      out.push_back(two_answers(0, chosen, pairs));
    }
  }
  return out;
}
std::vector<Case> runaways() { return runaways_of(true); }
std::vector<Case> labelled_runaways() { return runaways_of(false); }

// The number of each row: the largest of its active slots, `absent` where there is none.
at::Tensor of_rows(const Tensors& tensors, size_t array, double absent) {
  const at::Tensor none = at::full({}, -INFINITY, at::dtype(at::kDouble));
  const at::Tensor values = at::where(tensors.response_mask.detach() != 0,
                                      tensors.arrays[array].detach().to(at::kDouble), none);
  const auto largest = [&](const at::Tensor& row) { return row.numel() > 0 ? row.max() : none; };
  std::vector<at::Tensor> rows;
  if (tensors.offsets.defined()) {
    const std::vector<double> offsets = to_vector(tensors.offsets);
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      rows.push_back(largest(values.slice(0, int64_t(offsets[i]), int64_t(offsets[i + 1]))));
    }
  } else {
    for (int64_t i = 0; i < values.size(0); ++i) rows.push_back(largest(values[i]));
  }
  if (rows.empty()) return at::zeros({0}, none.options());
  const at::Tensor out = at::stack(rows);
  return at::where(out == -INFINITY, at::full_like(out, absent), out);
}

PreferenceBatch batch_of(const Tensors& tensors, const LossTraits& traits) {
  PreferenceBatch out;
  out.logps = tensors.arrays[kLogps];
  if (traits.needs_ref_logps) out.ref_logps = tensors.arrays[kRefLogps];
  out.response_mask = tensors.response_mask;
  if (traits.takes_answer_numbers) {
    out.baselines = of_rows(tensors, kBaselines, 0);
    out.answer_weights = of_rows(tensors, kWeights, 1).abs();
  }
  if (traits.needs_labels) out.labels = of_rows(tensors, kLabels, 1).clamp(0, 1);
  out.offsets = tensors.offsets;
  return out;
}

const Family kPreference{.batch = "tether::PreferenceBatch",
                         .arrays = {"logps", "ref_logps", "baselines", "answer_weights", "labels"},
                         .free_array = kNoArray,
                         .id_array = kNoArray,
                         .simplest = simplest,
                         .drawn = drawn,
                         .bounds = bounds,
                         .runaways = runaways,
                         .magnitude = magnitude_by_moving,
                         .properties = preference_properties};

Family labelled_family() {
  Family out = kPreference;
  out.simplest = simplest_labelled;
  out.drawn = drawn_rows;
  out.runaways = labelled_runaways;
  return out;
}
const Family kLabelled = labelled_family();

}  // namespace

Report check_preference_loss(const PreferenceLoss& loss, const LossTraits& traits,
                             const CheckOptions& options) {
  const auto call = [&](const Tensors& tensors, const Normalizer& step) {
    PairNormalizer pairs;
    pairs.pairs = step.sequences;
    pairs.tokens = step.kl;
    pairs.world_size = step.world_size;
    pairs.scale = step.scale;
    return loss(batch_of(tensors, traits), pairs);
  };
  const Family& family = traits.needs_labels ? kLabelled : kPreference;
  return check({.family = family, .traits = traits, .loss = call}, options);
}

LossTraits traits_of(const PreferenceObjective& objective) {
  const Traits& formula = objective.loss.traits();
  return {.takes_offsets = true,
          .needs_ref_logps = objective.reference,
          .needs_labels = objective.loss.takes_labels(),
          .takes_answer_numbers = true,
          .is_function_of_log_ratio =
              objective.reference && formula.of_log_ratio && objective.nll.coefficient == 0,
          .gradient_is_derivative = !formula.stops_gradient,
          .pulls_back = formula.pulls_back && objective.link.traits().pulls_back,
          .bitwise = true,
          .refuses_double_backward = true};
}

}  // namespace tether::testing
