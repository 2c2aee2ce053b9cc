#include "libtorch/tensor_number.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "core/number.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A value and its slope with respect to x, both known: nothing of torch's own gradient rules, which
// give NaN where a branch that was not taken is infinite.
class Chain : public torch::autograd::Function<Chain> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            const at::Tensor& slope, const at::Tensor&) {
    context->save_for_backward({slope});
    return value.clone();
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    return {{}, {}, gradients[0] * context->get_saved_variables()[0]};
  }
};

TensorNumber chain(const at::Tensor& value, const at::Tensor& slope, const TensorNumber& x) {
  if (!x.value.requires_grad()) return {value};
  return {Chain::apply(value, slope, x.value)};
}

double saturation(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? kSaturation<double> : double(kSaturation<float>);
}

at::Tensor saturated(const at::Tensor& x) { return x.clamp(-saturation(x), saturation(x)); }

// One that the type cannot hold is infinity.
at::Tensor constant_like(const at::Tensor& x, double value) {
  const auto options = x.options().requires_grad(false);
  return at::scalar_tensor(value, options.dtype(at::kDouble)).to(options.dtype());
}

// e^d - 1 - d: the series where the difference would cancel.
at::Tensor expm1_minus_value(const at::Tensor& d) {
  at::Tensor series = at::full_like(d, 1 / std::tgamma(20.0));
  for (int k = 16; k >= 0; --k) series = series * d + 1 / std::tgamma(k + 3.0);
  return at::where(d.abs() < 0.5, series * d * d, at::expm1(d) - d);
}

}  // namespace

TensorNumber operator+(const TensorNumber& a, const TensorNumber& b) { return {a.value + b.value}; }
TensorNumber operator-(const TensorNumber& a, const TensorNumber& b) { return {a.value - b.value}; }
TensorNumber operator*(const TensorNumber& a, const TensorNumber& b) { return {a.value * b.value}; }
TensorNumber operator/(const TensorNumber& a, const TensorNumber& b) { return {a.value / b.value}; }
TensorNumber operator-(const TensorNumber& a) { return {-a.value}; }
TensorNumber operator+(const TensorNumber& a, double b) { return {a.value + b}; }
TensorNumber operator+(double a, const TensorNumber& b) { return {b.value + a}; }
TensorNumber operator-(const TensorNumber& a, double b) { return {a.value - b}; }
TensorNumber operator-(double a, const TensorNumber& b) { return {a - b.value}; }
TensorNumber operator*(const TensorNumber& a, double b) { return {a.value * b}; }
TensorNumber operator*(double a, const TensorNumber& b) { return {b.value * a}; }
TensorNumber operator/(const TensorNumber& a, double b) { return {a.value / b}; }
TensorNumber operator/(double a, const TensorNumber& b) { return {a / b.value}; }

TensorCondition operator<(const TensorNumber& a, const TensorNumber& b) {
  return {a.value < b.value};
}
TensorCondition operator>(const TensorNumber& a, const TensorNumber& b) {
  return {a.value > b.value};
}
TensorCondition operator<(const TensorNumber& a, double b) { return {a.value < b}; }
TensorCondition operator>(const TensorNumber& a, double b) { return {a.value > b}; }

TensorNumber select(const TensorCondition& condition, const TensorNumber& a,
                    const TensorNumber& b) {
  return {at::where(condition.holds, a.value, b.value)};
}

TensorNumber min(const TensorNumber& a, const TensorNumber& b) {
  return select({(b.value < a.value).logical_or(at::isnan(b.value))}, b, a);
}
TensorNumber max(const TensorNumber& a, const TensorNumber& b) {
  return select({(b.value > a.value).logical_or(at::isnan(b.value))}, b, a);
}
TensorNumber min(const TensorNumber& a, double b) {
  return min(a, TensorNumber{constant_like(a.value, b)});
}
TensorNumber max(const TensorNumber& a, double b) {
  return max(a, TensorNumber{constant_like(a.value, b)});
}
TensorNumber clamp(const TensorNumber& x, double low, double high) {
  return min(max(x, low), high);
}
TensorNumber abs(const TensorNumber& x) {
  return chain(x.value.detach().abs(), x.value.detach().sgn(), x);
}

TensorNumber stop_gradient(const TensorNumber& x) { return {x.value.detach()}; }

TensorNumber with_gradient_of(const TensorNumber& value, const TensorNumber& gradient_source) {
  const at::Tensor constant = value.value.detach();
  return chain(constant.expand_as(gradient_source.value), constant_like(constant, 1),
               gradient_source);
}

TensorNumber exp(const TensorNumber& x) {
  const at::Tensor value = at::exp(saturated(x.value.detach()));
  return chain(value, value, x);
}

Chances<TensorNumber> chances(const TensorNumber& x) { return {exp(x), -expm1(x)}; }

TensorNumber expm1(const TensorNumber& x) {
  const at::Tensor bounded = saturated(x.value.detach());
  return chain(at::expm1(bounded), at::exp(bounded), x);
}

TensorNumber expm1_minus(const TensorNumber& x) {
  const at::Tensor bounded = x.value.detach().clamp_max(saturation(x.value));
  return chain(expm1_minus_value(bounded), at::expm1(bounded), x);
}

TensorNumber log(const TensorNumber& x) {
  const at::Tensor constant = x.value.detach();
  return chain(at::log(constant), 1 / constant, x);
}

TensorNumber log_quotient(const TensorNumber& a, const TensorNumber& b) { return log(a / b); }

TensorNumber log1p(const TensorNumber& x) {
  const at::Tensor constant = x.value.detach();
  return chain(at::log1p(constant), 1 / (1 + constant), x);
}

TensorNumber sigmoid(const TensorNumber& x) {
  const at::Tensor constant = x.value.detach();
  const at::Tensor value = at::sigmoid(constant);
  return chain(value, value * at::sigmoid(-constant), x);
}

TensorNumber log_sigmoid(const TensorNumber& x) {
  const at::Tensor constant = x.value.detach();
  return chain(at::log_sigmoid(constant), at::sigmoid(-constant), x);
}

TensorNumber log1mexp(const TensorNumber& x) {
  const at::Tensor constant = x.value.detach();
  const at::Tensor value = at::where(constant > -std::log(2.0), at::log(-at::expm1(constant)),
                                     at::log1p(-at::exp(constant)));
  return chain(value, -1 / at::expm1(-constant), x);
}

}  // namespace tether
