#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <limits>

#include "testing/properties.h"

namespace tether::testing {
namespace {

// A number that a row shares is masked where the whole row is.
bool poisonable(const Case& batch, size_t array, size_t i) {
  if (batch.active(i)) return false;
  if (!batch.per_row || array + 1 != batch.arrays.size()) return true;
  const auto columns = static_cast<size_t>(batch.columns);
  for (size_t k = i / columns * columns; k < (i / columns + 1) * columns; ++k) {
    if (batch.active(k)) return false;
  }
  return true;
}

void poison(Case& batch, size_t array, double value) {
  for (size_t i = 0; i < batch.size(); ++i) {
    if (poisonable(batch, array, i)) batch[array][i] = value;
  }
}

Failure check_poison(const Probe& probe, const Case& batch) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double lowest = probe.dtype == at::kDouble ? std::numeric_limits<double>::lowest()
                                                   : std::numeric_limits<float>::lowest();
  const Observed want = probe(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    if (batch.active(i) || want.gradient[i] == 0) continue;
    return "gradient of a masked slot at " + place(batch, i) + ": " + changed(0, want.gradient[i]);
  }
  for (double value : {std::nan(""), infinity, -infinity, 1e30, -1e30, -1e10, -1e4, lowest}) {
    Case everywhere = batch;
    for (size_t array = 0; array < batch.arrays.size(); ++array) {
      Case one = batch;
      poison(one, array, value);
      poison(everywhere, array, value);
      const std::string what = "masked slots of " +
                               std::string(probe.subject.family.arrays[array]) + " hold " +
                               text(value);
      if (Failure failure = probe.same(what, probe(one), want)) return failure;
    }
    const std::string what = "masked slots of every array hold " + text(value);
    if (Failure failure = probe.same(what, probe(everywhere), want)) return failure;
  }
  return {};
}

// The batch with rows and columns inserted or moved gives the same, slot by slot.
Failure check_gathered(const Probe& probe, const Case& batch, const Indices& items,
                       const Indices& columns, bool bitwise, const std::string& what) {
  const Observed want = probe(batch);
  const Case other = gathered(batch, items, columns);
  Observed got = probe(other);
  for (size_t i = 0; i < other.size(); ++i) {
    if (!other.active(i) && got.gradient[i] != 0) return what + ": the padding has a gradient";
  }
  got.gradient = returned(batch, items, columns, got.gradient);
  if (bitwise) return probe.same(what, got, want);
  return probe.close(what, got, want, probe.magnitude(batch));
}

Indices padded(int64_t before, int64_t count, int64_t after) {
  Indices out(static_cast<size_t>(before), kPadding);
  for (int64_t i = 0; i < count; ++i) out.push_back(i);
  out.insert(out.end(), static_cast<size_t>(after), kPadding);
  return out;
}

Failure check_padding_right(const Probe& probe, const Case& batch) {
  for (int64_t extra : {1, 7, 600}) {
    if (Failure failure = check_gathered(
            probe, batch, all(batch.items()), padded(0, batch.columns, extra), probe.traits.bitwise,
            "with " + std::to_string(extra) + " masked columns on the right")) {
      return failure;
    }
  }
  return {};
}

Failure check_padding_left(const Probe& probe, const Case& batch) {
  return check_gathered(probe, batch, all(batch.items()), padded(7, batch.columns, 0), false,
                        "with 7 masked columns on the left");
}

Failure check_padding_rows(const Probe& probe, const Case& batch) {
  if (Failure failure =
          check_gathered(probe, batch, padded(0, batch.items(), 3), all(batch.columns),
                         probe.traits.bitwise, "with 3 masked rows at the end")) {
    return failure;
  }
  return check_gathered(probe, batch, padded(2, batch.items(), 0), all(batch.columns), false,
                        "with 2 masked rows at the start");
}

Failure check_row_permutation(const Probe& probe, const Case& batch) {
  Indices order;
  for (int64_t i = batch.items(); i-- > 0;) order.push_back(i);
  return check_gathered(probe, batch, order, all(batch.columns), false, "with the rows reversed");
}

Failure check_packed(const Probe& probe, const Case& batch) {
  return probe.same_or_close("packed, with offsets", probe(batch, {.layout = Layout::packed}),
                             probe(batch), batch);
}

Failure check_strides(const Probe& probe, const Case& batch) {
  const Observed want = probe(batch);
  struct Named {
    const char* name;
    Run run;
  };
  for (const Named& each : {Named{"transposed in memory", {.layout = Layout::transposed}},
                            Named{"every second element of a buffer", {.layout = Layout::sliced}},
                            Named{"from element 1 of a buffer", {.layout = Layout::misaligned}},
                            Named{"advantages expanded", {.expanded = true}}}) {
    if (Failure failure = probe.same_or_close(each.name, probe(batch, each.run), want, batch)) {
      return failure;
    }
  }
  return {};
}

Failure check_mask_dtypes(const Probe& probe, const Case& batch) {
  for (double weight : batch.response_mask) {
    if (weight != 0 && weight != 1) return {};
  }
  const Observed want = probe(batch);
  for (at::ScalarType type : {at::kBool, at::kLong}) {
    const std::string what = type == at::kBool ? "with a mask of bool" : "with a mask of int64";
    if (Failure failure =
            probe.same_or_close(what, probe(batch, {.mask_dtype = type}), want, batch)) {
      return failure;
    }
  }
  return {};
}

struct ThreadCount {
  int before = at::get_num_threads();
  ~ThreadCount() { at::set_num_threads(before); }
};

Failure check_threads(const Probe& probe, const Case& batch) {
  const ThreadCount restored;
  at::set_num_threads(1);
  const Observed want = probe(batch);
  for (int threads : {1, 2, 3, 8}) {
    at::set_num_threads(threads);
    const std::string what = "on " + std::to_string(threads) + " threads, then on one";
    if (Failure failure = probe.same_or_close(what, probe(batch), want, batch)) return failure;
  }
  return {};
}

Failure check_inputs_unchanged(const Probe& probe, const Case& batch) {
  const Tensors given = probe.tensors(batch), wanted = probe.tensors(batch);
  gradient_of(probe.forward(given).loss, given.arrays[0]);
  for (size_t k = 0; k < given.arrays.size(); ++k) {
    if (at::equal(given.arrays[k].detach(), wanted.arrays[k].detach())) continue;
    return std::string(probe.subject.family.arrays[k]) + " was written to";
  }
  if (at::equal(given.response_mask, wanted.response_mask)) return {};
  return "response_mask was written to";
}

Failure check_backward_twice(const Probe& probe, const Case& batch) {
  const Tensors tensors = probe.tensors(batch);
  const at::Tensor loss = probe.forward(tensors).loss;
  const at::Tensor first = gradient_of(loss, tensors.arrays[0], {}, true).clone();
  const at::Tensor second = gradient_of(loss, tensors.arrays[0]);
  if (at::equal(first, second)) return {};
  return "the gradient of the second backward is another";
}

Failure check_no_grad(const Probe& probe, const Case& batch) {
  const double want = probe(batch).loss;
  const auto value = [&](bool requires_grad) {
    Tensors tensors = probe.tensors(batch);
    if (!requires_grad) tensors.arrays[0] = tensors.arrays[0].detach();
    return probe.forward(tensors).loss.item<double>();
  };
  const double detached = value(false);
  if (detached != want) return "without requires_grad: loss " + changed(want, detached);
  {
    const at::NoGradGuard guard;
    const double unrecorded = value(true);
    if (unrecorded != want) return "under no_grad: loss " + changed(want, unrecorded);
  }
  const Tensors tensors = probe.tensors(batch);
  const c10::InferenceMode guard;
  const double inferred = probe.forward(tensors).loss.item<double>();
  if (inferred != want) return "in inference mode: loss " + changed(want, inferred);
  return {};
}

std::vector<double> rounded(const std::vector<double>& values, at::ScalarType type) {
  std::vector<double> out;
  for (double value : values) {
    out.push_back(type == at::kHalf ? double(c10::Half(static_cast<float>(value)))
                                    : double(c10::BFloat16(static_cast<float>(value))));
  }
  return out;
}

Failure check_half(const Probe& probe, Case batch, at::ScalarType type) {
  const std::string what = type == at::kHalf ? "in float16" : "in bfloat16";
  for (std::vector<double>& array : batch.arrays) array = rounded(array, type);
  const Observed got = probe(batch, {.dtype = type});
  Observed want = probe(batch);
  const Observed magnitude = probe.magnitude(batch);
  const bool bitwise = probe.traits.bitwise;
  if (bitwise && got.loss != want.loss) return what + ": loss " + changed(want.loss, got.loss);
  if (Failure failure = probe.close_losses(what, got.loss, want.loss, magnitude)) return failure;
  // Rounded once: to the nearest; without the promise of bits, to a neighbour.
  const double ulp = type == at::kHalf ? 0x1p-10 : 0x1p-7, smallest = 0x1p-24;
  const std::vector<double> nearest = rounded(want.gradient, type);
  for (size_t i = 0; i < nearest.size(); ++i) {
    const double bound = bitwise ? 0 : ulp * std::fabs(want.gradient[i]) + smallest;
    if (std::fabs(got.gradient[i] - nearest[i]) <= bound) continue;
    return what + ": gradient at " + place(batch, i) + " " + changed(nearest[i], got.gradient[i]);
  }
  return {};
}

Failure check_half_precision(const Probe& probe, const Case& batch) {
  if (probe.dtype != at::kFloat) return {};
  if (Failure failure = check_half(probe, batch, at::kBFloat16)) return failure;
  return check_half(probe, batch, at::kHalf);
}

std::string_view needs_offsets(const Subject& subject) {
  return subject.traits.takes_offsets ? "" : "the loss takes no packed rows";
}

std::string_view needs_half(const Subject& subject) {
  return subject.traits.takes_half_precision ? "" : "the loss takes no bfloat16 or float16";
}

constexpr Property kProperties[] = {
    {"poison",
     "What masked slots hold changes no bit of loss, gradient and metrics; their gradient is 0",
     Batches::small, never, check_poison},
    {"padding_right", "Masked columns on the right change nothing", Batches::shaped, never,
     check_padding_right},
    {"padding_left", "Masked columns on the left change nothing", Batches::shaped, never,
     check_padding_left},
    {"padding_rows", "Masked rows change nothing", Batches::shaped, never, check_padding_rows},
    {"row_permutation", "The order of the rows does not matter", Batches::small, never,
     check_row_permutation},
    {"packed", "Packed rows give what padded rows give", Batches::shaped, needs_offsets,
     check_packed},
    {"strides", "Any strides and alignment give what contiguous arrays give", Batches::shaped,
     never, check_strides},
    {"mask_dtypes", "A mask of bool, integers or floats is the same mask", Batches::small, never,
     check_mask_dtypes},
    {"threads", "The number of threads does not matter", Batches::large, never, check_threads},
    {"inputs_unchanged", "No input is written to", Batches::small, never, check_inputs_unchanged},
    {"backward_twice", "A second backward gives the same gradient", Batches::small, never,
     check_backward_twice},
    {"no_grad", "The value does not depend on whether a gradient is wanted", Batches::small, never,
     check_no_grad},
    {"half_precision",
     "bfloat16 and float16 give the loss of the same numbers in float32, and its gradient rounded",
     Batches::small, needs_half, check_half_precision},
};

}  // namespace

std::span<const Property> memory_properties() { return kProperties; }

}  // namespace tether::testing
