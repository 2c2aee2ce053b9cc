#include "estimators/kl/report.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/active_tokens.h"
#include "core/check.h"
#include "core/fields.h"
#include "core/select.h"
#include "core/sum.h"
#include "estimators/kl/forms.h"

namespace tether {
namespace {

// Log-ratios and estimates beyond this count as this: the squares of their sums stay finite.
constexpr double kLargest = 1e140;

// visit(weight, log_ratio) for every token of the row; NaN where it is infinite.
template <class Visit>
void for_each_token(const KlReportArrays& batch, int64_t row, Visit visit) {
  const auto bounded_visit = [&](double weight, double d) {
    visit(weight, bounded_or_nan(d, kLargest));
  };
  for_each_active(batch.layout, row, batch.response_mask, bounded_visit, batch.log_ratios);
}

// Weighted sums for Cov(d, r) / Var r: the means first, then products of the deviations from them.
// Ratios are in units of the largest one, so that no square overflows.
struct LambdaSums {
  double unit = 1;                  // 1 / the largest ratio, at most 1
  double first_d = 0, first_h = 0;  // of the first token; h = (r - 1) unit
  double w = 0, d = 0, h = 0;       // of gaps to the first: those of equal ones are exactly 0
  double dh = 0, hh = 0;            // of deviations

  double excess(double log_ratio) const { return expm1(Constant<double>{log_ratio}).value * unit; }
  void add(double weight, double log_ratio) {
    if (w == 0) {
      first_d = log_ratio;
      first_h = excess(log_ratio);
    }
    w += weight;
    d += weight * (log_ratio - first_d);
    h += weight * (excess(log_ratio) - first_h);
  }
  double mean_excess() const { return (first_h + h / w) / unit; }
  void add_deviation(double weight, double log_ratio) {
    const double deviation = excess(log_ratio) - first_h - h / w;
    dh += weight * (log_ratio - first_d - d / w) * deviation;
    hh += weight * deviation * deviation;
  }
  double lambda() const { return hh == 0 ? 1 : dh / hh * unit; }
};

double estimate(const KlReportOptions& options, double lambda, double log_ratio) {
  const Constant<double> d{log_ratio};
  switch (options.estimator) {
    case KlEstimator::k1:
      return k1(d).value;
    case KlEstimator::k2:
      return k2(d).value;
    case KlEstimator::k3:
      return k3(d).value;
    case KlEstimator::k_lambda:
      break;
  }
  return k_lambda(d, lambda).value;
}

// What the ratios say of the tokens, before any estimate.
KlReport report_of_ratios(const KlReportArrays& batch, const KlReportOptions& options) {
  const auto every_token = [&](auto visit) {
    for (int64_t row = 0; row < batch.layout.rows; ++row) for_each_token(batch, row, visit);
  };
  double largest = -infinity;
  every_token([&](double, double d) { largest = std::max(largest, d); });
  LambdaSums fit{.unit = exp(Constant<double>{-std::max(largest, 0.0)}).value};
  double sum_of_ratios = 0, squares = 0;
  every_token([&](double weight, double d) {
    fit.add(weight, d);
    const double r = exp(Constant<double>{d - largest}).value;  // in units of the largest
    sum_of_ratios += weight * r;
    squares += weight * r * r;
  });
  KlReport out;
  out.tokens = fit.w;
  if (fit.w == 0) return out;
  const bool fitted = options.estimator == KlEstimator::k_lambda && options.lambda < 0;
  if (fitted) every_token([&](double weight, double d) { fit.add_deviation(weight, d); });
  out.lambda = fitted ? fit.lambda() : std::max(options.lambda, 0.0);
  out.ratio_excess = fit.mean_excess();
  out.ess = sum_of_ratios * sum_of_ratios / squares;
  return out;
}

struct Sequence {
  double tokens = 0, sum = 0;
};

}  // namespace

KlReport kl_report(const KlReportArrays& batch, const KlReportOptions& options) {
  const RowLayout& layout = batch.layout;
  check_fields("kl_report", options);
  check_inputs("kl_report", batch);
  check_weights("kl_report", layout, batch.response_mask);
  KlReport out = report_of_ratios(batch, options);
  if (out.tokens == 0) return out;
  const auto sequence_of = [&](int64_t row) {
    Sequence sequence;
    for_each_token(batch, row, [&](double weight, double d) {
      sequence.tokens += weight;
      sequence.sum += weight * bounded(estimate(options, out.lambda, d), kLargest);
    });
    return sequence;
  };
  double sum = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const Sequence sequence = sequence_of(row);
    sum += sequence.sum;
    out.sequences += sequence.tokens > 0 ? 1 : 0;
  }
  out.mean = sum / out.tokens;
  double residuals = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const Sequence sequence = sequence_of(row);
    const double residual = sequence.sum - out.mean * sequence.tokens;
    residuals += residual * residual;
  }
  const double n = out.sequences;
  out.standard_error = n > 1 ? std::sqrt(n / (n - 1) * residuals) / out.tokens
                             : std::numeric_limits<double>::quiet_NaN();
  return out;
}

}  // namespace tether
