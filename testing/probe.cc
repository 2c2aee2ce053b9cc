#include "testing/probe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

namespace tether::testing {
namespace {

at::Tensor from_doubles(const std::vector<double>& values) {
  const at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::dtype(at::kDouble));
  if (!values.empty()) std::memcpy(out.data_ptr(), values.data(), values.size() * sizeof(double));
  return out;
}

// The same values in another place of memory.
at::Tensor laid_out(const at::Tensor& tensor, Layout layout) {
  switch (layout) {
    case Layout::transposed:
      return tensor.t().contiguous().t();
    case Layout::sliced: {
      const int64_t columns = tensor.size(1);
      const at::Tensor buffer = at::zeros({tensor.size(0), 2 * columns + 1}, tensor.options());
      return buffer.slice(1, 1, 2 * columns + 1, 2).copy_(tensor);
    }
    case Layout::misaligned: {
      const at::Tensor buffer = at::zeros({tensor.numel() + 1}, tensor.options());
      return buffer.narrow(0, 1, tensor.numel()).view(tensor.sizes()).copy_(tensor);
    }
    default:
      return tensor;
  }
}

// The slots of a packed batch: each row up to its last active token.
struct Packing {
  std::vector<double> slots, offsets = {0};
};

std::vector<int64_t> packed_lengths(const Case& batch) {
  std::vector<int64_t> out(static_cast<size_t>(batch.rows));
  int64_t tokens = 0;
  for (int64_t row = 0; row < batch.rows; ++row) {
    int64_t& length = out[static_cast<size_t>(row)];
    for (int64_t column = 0; column < batch.columns; ++column) {
      if (batch.active(batch.index(row, column))) length = column + 1;
    }
    tokens += length;
  }
  // As many tokens as rows, and one number each may be read in two ways: a masked slot more.
  const auto shorter =
      std::find_if(out.begin(), out.end(), [&](int64_t length) { return length < batch.columns; });
  if (tokens == batch.rows && shorter != out.end()) ++*shorter;
  return out;
}

Packing packing_of(const Case& batch) {
  Packing out;
  const std::vector<int64_t> lengths = packed_lengths(batch);
  for (int64_t row = 0; row < batch.rows; ++row) {
    for (int64_t column = 0; column < lengths[static_cast<size_t>(row)]; ++column) {
      out.slots.push_back(static_cast<double>(batch.index(row, column)));
    }
    out.offsets.push_back(static_cast<double>(out.slots.size()));
  }
  return out;
}

bool equal(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

}  // namespace

Result::Result(at::Tensor loss_in, std::map<std::string, double> metrics_in)
    : loss(std::move(loss_in)), metrics(std::move(metrics_in)) {}

std::vector<double> to_vector(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().cpu().to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

at::Tensor gradient_of(const at::Tensor& loss, const at::Tensor& of, const at::Tensor& upstream,
                       bool retain) {
  if (!loss.requires_grad()) return at::zeros_like(of);
  const at::Tensor gradient =
      torch::autograd::grad({loss}, {of}, {upstream}, retain, false, /*allow_unused=*/true)[0];
  return gradient.defined() ? gradient : at::zeros_like(of);
}

std::string changed(double want, double got) {
  char out[96];
  std::snprintf(out, sizeof(out), "%.17g, not %.17g", got, want);
  return out;
}

std::string place(const Case& batch, size_t i) {
  const auto columns = static_cast<size_t>(batch.columns);
  return "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]";
}

std::vector<double> times(std::vector<double> values, double factor) {
  for (double& value : values) value *= factor;
  return values;
}

Tensors Probe::tensors(const Case& batch, const Run& run) const {
  const at::ScalarType type = run.dtype.value_or(dtype);
  const Packing packing = packing_of(batch);
  const bool packed = run.layout == Layout::packed;
  const at::Tensor slots = from_doubles(packing.slots).to(at::kLong);
  const auto tokens = [&](const std::vector<double>& values, at::ScalarType of) {
    const at::Tensor flat = from_doubles(values).to(of);
    if (packed) return flat.index_select(0, slots);
    return laid_out(flat.view({batch.rows, batch.columns}), run.layout);
  };
  Tensors out;
  out.response_mask = tokens(batch.response_mask, run.mask_dtype.value_or(type));
  for (size_t k = 0; k < batch.arrays.size(); ++k) {
    out.arrays.push_back(k == run.without ? at::Tensor() : tokens(batch[k], type));
  }
  out.arrays[0] = out.arrays[0].detach().requires_grad_(true);
  if (batch.per_row && batch.columns > 0) {
    const at::Tensor each =
        from_doubles(batch.arrays.back()).view({batch.rows, batch.columns}).select(1, 0).to(type);
    const bool expanded = run.expanded && !packed;
    out.arrays.back() = expanded ? each.unsqueeze(1).expand({batch.rows, batch.columns}) : each;
  }
  if (packed) {
    out.offsets = from_doubles(packing.offsets).to(batch.rows % 2 ? at::kInt : at::kLong);
  }
  return out;
}

Observed Probe::operator()(const Case& batch, const Run& run) const {
  const Tensors given = tensors(batch, run);
  const Result result = loss_(given, run.normalizer);
  Observed out{.loss = result.loss.item<double>(), .gradient = {}, .metrics = result.metrics};
  out.gradient = to_vector(gradient_of(result.loss, given.arrays[0]));
  if (run.layout == Layout::packed) {
    std::vector<double> padded(batch.size());
    const Packing packing = packing_of(batch);
    for (size_t i = 0; i < packing.slots.size(); ++i) {
      padded[static_cast<size_t>(packing.slots[i])] = out.gradient[i];
    }
    out.gradient = padded;
  }
  return out;
}

Probe Probe::reference() const {
  return subject.reference ? Probe(subject, subject.reference, at::kDouble) : *this;
}

Failure Probe::same(const std::string& what, const Observed& got, const Observed& want) const {
  if (!equal(got.loss, want.loss)) return what + ": loss " + changed(want.loss, got.loss);
  for (size_t i = 0; i < want.gradient.size(); ++i) {
    if (equal(got.gradient[i], want.gradient[i])) continue;
    return what + ": gradient of token " + std::to_string(i) + " " +
           changed(want.gradient[i], got.gradient[i]);
  }
  for (const auto& [name, value] : want.metrics) {
    const auto found = got.metrics.find(name);
    if (found == got.metrics.end()) return what + ": metric " + name + " is missing";
    if (!equal(found->second, value)) {
      return what + ": metric " + name + " " + changed(value, found->second);
    }
  }
  return {};
}

Failure Probe::close_losses(const std::string& what, double got, double want,
                            const Observed& magnitude) const {
  const double bound = traits.tolerance * epsilon() * magnitude.loss;
  if (std::fabs(got - want) <= bound) return {};
  return what + ": loss " + changed(want, got);
}

Failure Probe::close_gradients(const std::string& what, const std::vector<double>& got,
                               const std::vector<double>& want, const Observed& magnitude) const {
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound = traits.tolerance * epsilon() * magnitude.gradient[i];
    if (std::fabs(got[i] - want[i]) <= bound) continue;
    return what + ": gradient of token " + std::to_string(i) + " " + changed(want[i], got[i]);
  }
  return {};
}

Failure Probe::close(const std::string& what, const Observed& got, const Observed& want,
                     const Observed& magnitude) const {
  if (Failure failure = close_losses(what, got.loss, want.loss, magnitude)) return failure;
  return close_gradients(what, got.gradient, want.gradient, magnitude);
}

Failure Probe::same_or_close(const std::string& what, const Observed& got, const Observed& want,
                             const Case& batch) const {
  if (traits.bitwise) return same(what, got, want);
  return close(what, got, want, magnitude(batch));
}

Observed magnitude_by_moving(const Probe& probe, const Case& batch, const Normalizer& step) {
  Case larger = batch;
  for (double& each : larger[0]) each *= 1 + 0x1p-8;
  const Observed at = probe(batch, {.normalizer = step}), by = probe(larger, {.normalizer = step});
  const auto bound = [](double a, double b) { return std::fabs(a) + 0x1p8 * std::fabs(b - a); };
  Observed out{.loss = bound(at.loss, by.loss), .gradient = at.gradient, .metrics = {}};
  for (size_t i = 0; i < batch.size(); ++i) {
    out.gradient[i] = bound(at.gradient[i], by.gradient[i]);
  }
  return out;
}

Normalizer Probe::counts(const Case& batch) const {
  return subject.counts ? subject.counts(tensors(batch)) : counts_of(batch);
}

std::string as_code(const Case& batch, const Subject& subject, at::ScalarType dtype) {
  std::ostringstream out;
  out.precision(dtype == at::kDouble ? 17 : 9);
  const auto array = [&](std::string_view name, const std::vector<double>& values, bool per_row) {
    out << "batch." << name << " = at::tensor(std::vector<double>{";
    const size_t stride = per_row ? static_cast<size_t>(batch.columns) : 1;
    for (size_t i = 0; i < values.size(); i += stride) out << (i ? ", " : "") << values[i];
    out << "}, at::k" << dtype << ").view({" << batch.rows;
    if (!per_row) out << ", " << batch.columns;
    out << "});\n";
  };
  const auto& names = subject.family.arrays;
  out << subject.family.batch << " batch;\n";
  for (size_t k = 0; k < names.size(); ++k) {
    if (names[k] == "ref_logps" && !subject.traits.needs_ref_logps) continue;
    if (names[k] == "rollout_logps" && !subject.traits.needs_rollout_logps) continue;
    array(names[k], batch[k], batch.per_row && k + 1 == names.size() && batch.columns > 0);
  }
  array("response_mask", batch.response_mask, false);
  return out.str();
}

}  // namespace tether::testing
