#include "testing/policy_probe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstring>

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

Packing packing_of(const PolicyCase& batch) {
  Packing out;
  for (int64_t row = 0; row < batch.rows; ++row) {
    int64_t length = 0;
    for (int64_t column = 0; column < batch.columns; ++column) {
      if (batch.active(batch.index(row, column))) length = column + 1;
    }
    for (int64_t column = 0; column < length; ++column) {
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

Result::Result(const LossOutput& output) : loss(output.loss), metrics(output.metrics.to_map()) {}

std::vector<double> to_vector(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().cpu().to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

at::Tensor gradient_of(const at::Tensor& loss, const at::Tensor& logps, const at::Tensor& upstream,
                       bool retain) {
  if (!loss.requires_grad()) return at::zeros_like(logps);
  const at::Tensor gradient =
      torch::autograd::grad({loss}, {logps}, {upstream}, retain, false, /*allow_unused=*/true)[0];
  return gradient.defined() ? gradient : at::zeros_like(logps);
}

std::string changed(double want, double got) {
  char out[96];
  std::snprintf(out, sizeof(out), "%.17g, not %.17g", got, want);
  return out;
}

std::string place(const PolicyCase& batch, size_t i) {
  const auto columns = static_cast<size_t>(batch.columns);
  return "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]";
}

PolicyBatch Probe::tensors(const PolicyCase& batch, const Run& run) const {
  const at::ScalarType type = run.dtype.value_or(dtype);
  const Packing packing = packing_of(batch);
  const bool packed = run.layout == Layout::packed;
  const at::Tensor slots = from_doubles(packing.slots).to(at::kLong);
  const auto tokens = [&](const std::vector<double>& values, at::ScalarType of) {
    const at::Tensor flat = from_doubles(values).to(of);
    if (packed) return flat.index_select(0, slots);
    return laid_out(flat.view({batch.rows, batch.columns}), run.layout);
  };
  PolicyBatch out;
  out.logps = tokens(batch.logps, type).detach().requires_grad_(true);
  out.response_mask = tokens(batch.response_mask, run.mask_dtype.value_or(type));
  if (!run.without_old_logps) out.old_logps = tokens(batch.old_logps, type);
  if (traits.needs_ref_logps) out.ref_logps = tokens(batch.ref_logps, type);
  out.advantages = tokens(batch.advantages, type);
  if (batch.advantages_per_row && batch.columns > 0) {
    const at::Tensor each =
        from_doubles(batch.advantages).view({batch.rows, batch.columns}).select(1, 0).to(type);
    const bool expanded = run.expanded_advantages && !packed;
    out.advantages = expanded ? each.unsqueeze(1).expand({batch.rows, batch.columns}) : each;
  }
  if (packed) {
    out.offsets = from_doubles(packing.offsets).to(batch.rows % 2 ? at::kInt : at::kLong);
  }
  return out;
}

Observed Probe::operator()(const PolicyCase& batch, const Run& run) const {
  const PolicyBatch tensors = this->tensors(batch, run);
  const Result result = loss_(tensors, run.normalizer);
  Observed out{.loss = result.loss.item<double>(), .gradient = {}, .metrics = result.metrics};
  out.gradient = to_vector(gradient_of(result.loss, tensors.logps));
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

Observed Probe::reference(const PolicyCase& batch) const {
  return Probe(traits.reference, traits, at::kDouble)(batch);
}

Observed Probe::magnitude(const PolicyCase& batch, const Run& run) const {
  const Probe wide(traits.reference ? traits.reference : loss_, traits,
                   traits.reference ? at::kDouble : dtype);
  PolicyCase good = batch, bad = batch;
  for (size_t i = 0; i < batch.size(); ++i) {
    good.advantages[i] = std::fabs(batch.advantages[i]) + 1;
    bad.advantages[i] = -good.advantages[i];
  }
  const Run plain{.normalizer = run.normalizer};
  const Observed a = wide(good, plain), b = wide(bad, plain);
  Observed out{
      .loss = std::fabs(a.loss) + std::fabs(b.loss), .gradient = a.gradient, .metrics = {}};
  for (size_t i = 0; i < batch.size(); ++i) {
    out.gradient[i] = std::fabs(a.gradient[i]) + std::fabs(b.gradient[i]);
  }
  return out;
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
                             const PolicyCase& batch) const {
  if (traits.bitwise) return same(what, got, want);
  return close(what, got, want, magnitude(batch));
}

Normalizer Probe::counts(const PolicyCase& batch) const {
  if (!traits.counts) return counts_of(batch);
  return traits.counts(tensors(batch));
}

}  // namespace tether::testing
