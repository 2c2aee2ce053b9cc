#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

// Tokens at a kink, where the one-sided differences disagree, are passed over.
Failure check_finite_difference(const Probe& probe, const Case& batch) {
  if (probe.dtype != at::kDouble) return {};
  constexpr double h = 1e-5;
  const Observed at = probe(batch), magnitude = probe.magnitude(batch);
  const auto moved = [&](size_t i, double by) {
    Case other = batch;
    other[0][i] += by;
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

Failure check_upstream(const Probe& probe, const Case& batch) {
  const Observed one = probe(batch), magnitude = probe.magnitude(batch);
  for (double upstream : {-1.0, 2.0, 0.0, 0.37}) {
    const Tensors tensors = probe.tensors(batch);
    const at::Tensor loss = probe.forward(tensors).loss;
    const std::vector<double> got =
        to_vector(gradient_of(loss, tensors.arrays[0], at::full_like(loss, upstream)));
    const std::string what = "upstream gradient " + text(upstream);
    if (Failure failure =
            probe.close_gradients(what, got, times(one.gradient, upstream), magnitude)) {
      return failure;
    }
  }
  Case other = batch;
  for (double& each : other.arrays.back()) each = 1 - each;
  const Tensors tensors = probe.tensors(batch);
  Tensors second = probe.tensors(other);
  second.arrays[0] = tensors.arrays[0];
  const at::Tensor sum = 3 * probe.forward(tensors).loss - 0.5 * probe.forward(second).loss;
  const std::vector<double> got = to_vector(gradient_of(sum, tensors.arrays[0]));
  std::vector<double> want = probe(other).gradient;
  for (size_t i = 0; i < want.size(); ++i) want[i] = 3 * one.gradient[i] - 0.5 * want[i];
  Observed wider = magnitude;
  const std::vector<double> of_other = probe.magnitude(other).gradient;
  for (size_t i = 0; i < want.size(); ++i) {
    wider.gradient[i] = 4 * magnitude.gradient[i] + of_other[i];
  }
  return probe.close_gradients("3 loss - 0.5 loss of another batch", got, want, wider);
}

Failure check_double_backward(const Probe& probe, const Case& batch) {
  const Tensors tensors = probe.tensors(batch);
  const at::Tensor loss = probe.forward(tensors).loss;
  try {
    const at::Tensor first =
        torch::autograd::grad({loss}, {tensors.arrays[0]}, {}, true, /*create_graph=*/true)[0];
    torch::autograd::grad({first.sum()}, {tensors.arrays[0]}, {}, false, false,
                          /*allow_unused=*/true);
  } catch (const std::exception&) {
    return {};
  }
  return "a second derivative was given, not refused";
}

Failure check_finite(const Probe& probe, const Case& batch) {
  const Observed got = probe(batch);
  if (!std::isfinite(got.loss)) return "loss " + text(got.loss);
  for (size_t i = 0; i < got.gradient.size(); ++i) {
    if (std::isfinite(got.gradient[i])) continue;
    return "gradient at " + place(batch, i) + " " + text(got.gradient[i]) + ", loss " +
           text(got.loss);
  }
  return {};
}

std::string_view needs_derivative(const Subject& subject) {
  const LossTraits& traits = subject.traits;
  if (!traits.gradient_is_derivative) return "the gradient is not the derivative of the value";
  const auto& types = traits.dtypes;
  const bool wide = std::find(types.begin(), types.end(), at::kDouble) != types.end();
  return wide ? "" : "the loss takes no float64";
}
std::string_view needs_refusal(const Subject& subject) {
  return subject.traits.refuses_double_backward ? "" : "the loss may have a second derivative";
}
std::string_view needs_survival(const Subject& subject) {
  return subject.traits.survives_runaways ? ""
                                          : "the loss promises nothing for a token that ran away";
}

constexpr Property kProperties[] = {
    {"finite_difference", "The gradient is the central difference of the value, away from kinks",
     Batches::small, needs_derivative, check_finite_difference},
    {"upstream", "The gradient is linear in the upstream gradient", Batches::small, never,
     check_upstream},
    {"double_backward", "A second derivative is refused", Batches::small, needs_refusal,
     check_double_backward},
    {"finite", "No finite input gives a NaN or infinity", Batches::runaways, needs_survival,
     check_finite},
};

}  // namespace

std::span<const Property> gradient_properties() { return kProperties; }

}  // namespace tether::testing
