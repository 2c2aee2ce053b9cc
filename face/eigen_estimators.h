#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../core/batch.h"
#include "../core/check.h"
#include "../estimators/advantage/catalogue.h"
#include "../estimators/advantage/groups.h"
#include "../estimators/advantage/row_scan.h"
#include "../estimators/advantage/whitening.h"
#include "../estimators/kl/exact.h"
#include "../estimators/kl/forms.h"
#include "../estimators/kl/mismatch.h"
#include "../estimators/kl/report.h"
#include "arguments.h"

// The estimators on Eigen arrays: a row is a sequence, a column a token. Inputs are views, of any
// storage order and strides, of float, double, (masks) bool or (ids) integers; results are new
// arrays of double.
// Each function throws Error for a shape that does not fit; formulas, options and rules for masked
// slots are those of the functions that it calls.
//
//   const Eigen::ArrayXXd k = tether::eigen::k3(ref_logps - logps);
//   const auto [advantages, returns] = tether::eigen::generalized_advantage_estimation(
//       rewards, values, mask, {.gamma = 1, .lambda = 0.95});

namespace tether::eigen {

// A view of an Eigen array or matrix, Map, Ref or block of one; {} is absent. An expression that
// would have to be evaluated first does not compile: it would be gone before it is read.
class Tokens {
 public:
  Tokens() = default;

  template <class Derived>
  Tokens(const Eigen::DenseBase<Derived>& x)
      : array_{.data = x.derived().data(),
               .dtype = dtype<typename Derived::Scalar>(),
               .row_stride = x.derived().rowStride(),
               .column_stride = x.derived().colStride()},
        rows_(x.rows()),
        columns_(x.cols()) {
    static_assert(Derived::Flags & Eigen::DirectAccessBit, "evaluate the expression into an array");
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // As face/arguments.h asks a tensor.
  bool defined() const { return bool(array_); }
  int64_t dim() const { return 2; }
  int64_t size(int64_t d) const { return d == 0 ? rows_ : columns_; }
  int64_t stride(int64_t d) const { return d == 0 ? array_.row_stride : array_.column_stride; }
  const void* const_data_ptr() const { return array_.data; }
  DType scalar_type() const { return array_.dtype; }
  // One value per row, in a single row or column of an array.
  bool is_per_row(int64_t rows) const {
    const bool vector = std::min(rows_, columns_) == 1 || rows_ * columns_ == 0;
    return vector && rows_ * columns_ == rows;
  }
  int64_t step_of_rows() const {
    return rows_ == 1 && columns_ > 1 ? array_.column_stride : array_.row_stride;
  }

 private:
  template <class Scalar>
  static constexpr DType dtype() {
    using S = std::remove_const_t<Scalar>;
    constexpr bool kIds = std::is_integral_v<S> && std::is_signed_v<S> && sizeof(S) >= 4;
    static_assert(
        std::is_same_v<S, float> || std::is_same_v<S, double> || std::is_same_v<S, bool> || kIds,
        "arrays are of float, double or bool, those of ids of int32 or int64");
    if constexpr (kIds) return sizeof(S) == 4 ? DType::int32 : DType::int64;
    return std::is_same_v<S, float>    ? DType::float32
           : std::is_same_v<S, double> ? DType::float64
                                       : DType::boolean;
  }

  ConstArray array_ = {};
  int64_t rows_ = 0, columns_ = 0;
};

}  // namespace tether::eigen

namespace tether {

template <>
struct RowsOf<eigen::Tokens> {
  using Layout = Nothing;
  using Offsets = Nothing;
};

template <>
struct face::Access<eigen::Tokens> {
  static Element element(const eigen::Tokens& tokens) {
    const DType type = tokens.scalar_type();
    return {.dtype = type,
            .index = is_integer(type),
            .name = std::string(type == DType::boolean ? "bool" : name_of(type))};
  }
  static std::string device(const eigen::Tokens&) { return "cpu"; }
};

}  // namespace tether

namespace tether::eigen {

namespace detail {

// The arrays of a checked batch.
template <template <class> class Inputs>
Inputs<ConstArray> arrays_of(std::string_view function, const Inputs<Tokens>& batch) {
  face::check_arguments(function, batch);
  return face::arrays_of(function, batch);
}

inline Eigen::ArrayXXd new_like(const Tokens& tokens) {
  return Eigen::ArrayXXd(tokens.rows(), tokens.columns());
}

inline MutableArray output(Eigen::ArrayXXd& x) {
  return {.data = x.data(),
          .dtype = DType::float64,
          .row_stride = x.rowStride(),
          .column_stride = x.colStride()};
}

template <class Matrix>
std::string shape_text(const Matrix& x) {
  return in_brackets(text(x.rows()) + ", " + text(x.cols()));
}

// formula(a, b ...) of every element, in double.
template <class Formula, class First, class... Rest>
Eigen::ArrayXXd elementwise(Formula formula, const Eigen::ArrayBase<First>& first,
                            const Eigen::ArrayBase<Rest>&... rest) {
  Eigen::ArrayXXd out(first.rows(), first.cols());
  [[maybe_unused]] const auto sized = [&](const auto& x) {
    return x.rows() == out.rows() && x.cols() == out.cols();
  };
  require((sized(rest) && ...), [] { return std::string("arrays must have the same shape"); });
  for (Eigen::Index j = 0; j < out.cols(); ++j) {
    for (Eigen::Index i = 0; i < out.rows(); ++i) {
      out(i, j) =
          formula(double(first.derived().coeff(i, j)), double(rest.derived().coeff(i, j))...);
    }
  }
  return out;
}

}  // namespace detail

// ---- one-sample KL estimators (estimators/kl/forms.h): any expression of log_ratios -------------

template <class Derived>
Eigen::ArrayXXd k1(const Eigen::ArrayBase<Derived>& log_ratios) {
  return -log_ratios.template cast<double>();
}
template <class Derived>
Eigen::ArrayXXd k2(const Eigen::ArrayBase<Derived>& log_ratios) {
  return detail::elementwise([](double d) { return tether::k2(Constant<double>{d}).value; },
                             log_ratios);
}
template <class Derived>
Eigen::ArrayXXd k3(const Eigen::ArrayBase<Derived>& log_ratios) {
  return detail::elementwise([](double d) { return tether::k3(Constant<double>{d}).value; },
                             log_ratios);
}
template <class Derived>
Eigen::ArrayXXd k_lambda(const Eigen::ArrayBase<Derived>& log_ratios, double lambda) {
  return detail::elementwise(
      [=](double d) { return tether::k_lambda(Constant<double>{d}, lambda).value; }, log_ratios);
}

// The mean over active tokens and how far to trust it (estimators/kl/report.h).
inline KlReport kl_report(const Tokens& log_ratios, const Tokens& response_mask,
                          const KlReportOptions& options = {}) {
  const KlReportInputs<Tokens> batch{.log_ratios = log_ratios, .response_mask = response_mask};
  return tether::kl_report(detail::arrays_of("kl_report", batch), options);
}

// How far the trainer's policy is from the engine that sampled (estimators/kl/mismatch.h).
inline MismatchReport mismatch_report(const Tokens& old_logps, const Tokens& rollout_logps,
                                      const Tokens& response_mask) {
  const MismatchInputs<Tokens> batch{
      .old_logps = old_logps, .rollout_logps = rollout_logps, .response_mask = response_mask};
  return tether::mismatch_report(detail::arrays_of("mismatch_report", batch));
}

// ---- exact KL divergences (estimators/kl/exact.h) -----------------------------------------------

// KL(q || p) of every row, from log-probabilities [N, V], and its gradients with respect to the
// logits of both.
struct CategoricalKl {
  Eigen::ArrayXd kl;
  Eigen::ArrayXXd dlogits_q, dlogits_p;
};

template <class Q, class P>
CategoricalKl categorical_kl(const Eigen::ArrayBase<Q>& log_q, const Eigen::ArrayBase<P>& log_p) {
  using Rows = Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Rows q = log_q.template cast<double>(), p = log_p.template cast<double>();
  require(q.rows() == p.rows() && q.cols() == p.cols(), [&] {
    return "categorical_kl: log_p must be " + detail::shape_text(q) + " like log_q, got " +
           detail::shape_text(p);
  });
  Rows dq(q.rows(), q.cols()), dp(q.rows(), q.cols());
  CategoricalKl out{Eigen::ArrayXd(q.rows()), {}, {}};
  for (Eigen::Index i = 0; i < q.rows(); ++i) {
    const Eigen::Index row = i * q.cols();
    out.kl(i) = tether::categorical_kl(q.data() + row, p.data() + row, q.cols(), dq.data() + row,
                                       dp.data() + row);
  }
  out.dlogits_q = dq;
  out.dlogits_p = dp;
  return out;
}

template <class Q, class P>
Eigen::ArrayXXd bernoulli_kl(const Eigen::ArrayBase<Q>& logit_q,
                             const Eigen::ArrayBase<P>& logit_p) {
  return detail::elementwise([](double q, double p) { return tether::bernoulli_kl(q, p); }, logit_q,
                             logit_p);
}

template <class MeanQ, class StdQ, class MeanP, class StdP>
Eigen::ArrayXXd gaussian_kl(const Eigen::ArrayBase<MeanQ>& mean_q,
                            const Eigen::ArrayBase<StdQ>& log_std_q,
                            const Eigen::ArrayBase<MeanP>& mean_p,
                            const Eigen::ArrayBase<StdP>& log_std_p) {
  return detail::elementwise(
      [](double a, double b, double c, double d) { return tether::gaussian_kl(a, b, c, d); },
      mean_q, log_std_q, mean_p, log_std_p);
}

// ---- advantages (estimators/advantage/catalogue.h) ----------------------------------------------

struct AdvantagesAndReturns {
  Eigen::ArrayXXd advantages;
  Eigen::ArrayXXd returns;
};
using AdvantageBatch = AdvantageInputs<Tokens>;
using GaeBatch = AdvantageBatch;

namespace detail {

inline AdvantagesAndReturns scanned(std::string_view function, const AdvantageBatch& batch,
                                    const Recursion& recursion) {
  const AdvantageArrays arrays = arrays_of(function, batch);
  AdvantagesAndReturns out{new_like(batch.rewards), new_like(batch.rewards)};
  scan_rows(function, arrays, recursion, output(out.advantages), output(out.returns));
  return out;
}

}  // namespace detail

// By any recursion, the library's own or yours: advantage(batch, Gae{.lambda = 0.95}).
inline AdvantagesAndReturns advantage(const AdvantageBatch& batch, const Recursion& recursion) {
  return detail::scanned("advantage", batch, recursion);
}

inline Eigen::ArrayXXd discounted_returns(const Tokens& rewards, const Tokens& response_mask,
                                          const DiscountedReturns& options = {},
                                          const Tokens& bootstrap = {}) {
  const AdvantageBatch batch{
      .rewards = rewards, .response_mask = response_mask, .bootstrap = bootstrap};
  return detail::scanned("discounted_returns", batch, options).returns;
}

inline AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch,
                                                             const Gae& options = {}) {
  return detail::scanned("generalized_advantage_estimation", batch, options);
}
inline AdvantagesAndReturns generalized_advantage_estimation(const Tokens& rewards,
                                                             const Tokens& values,
                                                             const Tokens& response_mask,
                                                             const Gae& options = {}) {
  return generalized_advantage_estimation(
      GaeBatch{.rewards = rewards, .values = values, .response_mask = response_mask}, options);
}

// The rewards of sequences, their groups by `group_size` or ids, and their lengths for rules that
// need them.
struct GroupBatch {
  Eigen::ArrayXd rewards;
  Eigen::Array<int64_t, Eigen::Dynamic, 1> group_ids = {};
  Eigen::ArrayXd lengths = {};
  int64_t group_size = 0;
};

namespace detail {

inline Eigen::ArrayXd grouped(std::string_view function, const GroupBatch& batch,
                              const GroupRule& rule) {
  const auto check_size = [&](std::string_view name, Eigen::Index size) {
    require(size == 0 || size == batch.rewards.size(), [&] {
      return std::string(function) + ": " + std::string(name) + " must be " +
             in_brackets(text(int64_t(batch.rewards.size()))) + " like rewards, got " +
             in_brackets(text(int64_t(size)));
    });
  };
  check_size("group_ids", batch.group_ids.size());
  check_size("lengths", batch.lengths.size());
  Eigen::ArrayXd out(batch.rewards.size());
  advantages_of_groups(function,
                       {.rewards = batch.rewards.data(),
                        .group_ids = batch.group_ids.size() ? batch.group_ids.data() : nullptr,
                        .lengths = batch.lengths.size() ? batch.lengths.data() : nullptr,
                        .group_size = batch.group_size,
                        .count = batch.rewards.size()},
                       rule, out.data());
  return out;
}

}  // namespace detail

// By any rule of groups, the library's own or yours.
inline Eigen::ArrayXd advantage(const GroupBatch& batch, const GroupRule& rule) {
  return detail::grouped("advantage", batch, rule);
}

// Groups of `group_size` consecutive rewards, or by id.
inline Eigen::ArrayXd group_advantage(const Eigen::Ref<const Eigen::ArrayXd>& rewards,
                                      int64_t group_size, const GroupAdvantage& options = {}) {
  return detail::grouped("group_advantage", {.rewards = rewards, .group_size = group_size},
                         options);
}
inline Eigen::ArrayXd group_advantage(
    const Eigen::Ref<const Eigen::ArrayXd>& rewards,
    const Eigen::Ref<const Eigen::Array<int64_t, Eigen::Dynamic, 1>>& group_ids,
    const GroupAdvantage& options = {}) {
  require(group_ids.size() == rewards.size(), [&] {
    return "group_advantage: group_ids must be [" + text(int64_t(rewards.size())) +
           "] like rewards, got [" + text(int64_t(group_ids.size())) + "]";
  });
  return detail::grouped("group_advantage", {.rewards = rewards, .group_ids = group_ids}, options);
}

// ---- whitening (estimators/advantage/whitening.h) -----------------------------------------------

inline Moments moments(const Tokens& values, const Tokens& response_mask) {
  const WhiteningInputs<Tokens> batch{.values = values, .response_mask = response_mask};
  return tether::moments(detail::arrays_of("moments", batch));
}

// With the moments of the whole step, from the caller.
inline Eigen::ArrayXXd whiten(const Tokens& values, const Tokens& response_mask,
                              const Moments& step, const Whitening& options = {}) {
  const WhiteningInputs<Tokens> batch{.values = values, .response_mask = response_mask};
  const WhiteningArrays arrays = detail::arrays_of("whiten", batch);
  Eigen::ArrayXXd out = detail::new_like(values);
  tether::whiten(arrays, step, options, detail::output(out));
  return out;
}
// With those of these values.
inline Eigen::ArrayXXd whiten(const Tokens& values, const Tokens& response_mask,
                              const Whitening& options = {}) {
  return whiten(values, response_mask, moments(values, response_mask), options);
}

}  // namespace tether::eigen
