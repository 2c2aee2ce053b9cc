#pragma once

#include <ATen/core/Tensor.h>

#include "../core/number.h"

namespace tether {

// A tensor as a number of a formula (core/number.h): the formulas of the library run on any device
// under torch's autograd, with the tie and saturation rules of Dual. Constants are detached
// tensors.
struct TensorNumber {
  at::Tensor value;
};

// The condition of a select.
struct TensorCondition {
  at::Tensor holds;
};

TensorNumber operator+(const TensorNumber& a, const TensorNumber& b);
TensorNumber operator-(const TensorNumber& a, const TensorNumber& b);
TensorNumber operator*(const TensorNumber& a, const TensorNumber& b);
TensorNumber operator/(const TensorNumber& a, const TensorNumber& b);
TensorNumber operator-(const TensorNumber& a);
TensorNumber operator+(const TensorNumber& a, double b);
TensorNumber operator+(double a, const TensorNumber& b);
TensorNumber operator-(const TensorNumber& a, double b);
TensorNumber operator-(double a, const TensorNumber& b);
TensorNumber operator*(const TensorNumber& a, double b);
TensorNumber operator*(double a, const TensorNumber& b);
TensorNumber operator/(const TensorNumber& a, double b);
TensorNumber operator/(double a, const TensorNumber& b);

TensorCondition operator<(const TensorNumber& a, const TensorNumber& b);
TensorCondition operator>(const TensorNumber& a, const TensorNumber& b);
TensorCondition operator<(const TensorNumber& a, double b);
TensorCondition operator>(const TensorNumber& a, double b);

TensorNumber select(const TensorCondition& condition, const TensorNumber& a, const TensorNumber& b);
TensorNumber min(const TensorNumber& a, const TensorNumber& b);
TensorNumber max(const TensorNumber& a, const TensorNumber& b);
TensorNumber min(const TensorNumber& a, double b);
TensorNumber max(const TensorNumber& a, double b);
TensorNumber clamp(const TensorNumber& x, double low, double high);
TensorNumber abs(const TensorNumber& x);

TensorNumber stop_gradient(const TensorNumber& x);
TensorNumber with_gradient_of(const TensorNumber& value, const TensorNumber& gradient_source);

TensorNumber exp(const TensorNumber& x);
Chances<TensorNumber> chances(const TensorNumber& x);
TensorNumber expm1(const TensorNumber& x);
TensorNumber expm1_minus(const TensorNumber& x);
TensorNumber log(const TensorNumber& x);
TensorNumber log_quotient(const TensorNumber& a, const TensorNumber& b);
TensorNumber log1p(const TensorNumber& x);
TensorNumber sigmoid(const TensorNumber& x);
TensorNumber log_sigmoid(const TensorNumber& x);
TensorNumber log1mexp(const TensorNumber& x);

}  // namespace tether
