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
#include "../estimators/advantage/gae.h"
#include "../estimators/advantage/group.h"
#include "../estimators/advantage/returns.h"
#include "../estimators/kl/exact.h"
#include "../estimators/kl/forms.h"
#include "../estimators/kl/report.h"
#include "../estimators/advantage/whitening.h"

// The estimators on Eigen arrays: a row is a sequence, a column a token. Inputs are views, of any
// storage order and strides, of float, double or (masks) bool; results are new arrays of double.
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

  explicit operator bool() const { return bool(array_); }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  bool like(const Tokens& other) const {
    return rows_ == other.rows_ && columns_ == other.columns_;
  }
  RowLayout layout() const { return {.rows = rows_, .columns = columns_}; }
  const ConstArray& array() const { return array_; }
  // One value per row, in a single row or column of an array.
  ConstArray per_row() const {
    ConstArray out = array_;
    if (rows_ == 1 && columns_ > 1) out.row_stride = out.column_stride;
    out.column_stride = 0;
    out.per_row = true;
    return out;
  }

 private:
  template <class Scalar>
  static constexpr DType dtype() {
    using S = std::remove_const_t<Scalar>;
    static_assert(std::is_same_v<S, float> || std::is_same_v<S, double> || std::is_same_v<S, bool>,
                  "arrays are of float, double or bool");
    return std::is_same_v<S, float>    ? DType::float32
           : std::is_same_v<S, double> ? DType::float64
                                       : DType::boolean;
  }

  ConstArray array_ = {};
  int64_t rows_ = 0, columns_ = 0;
};

namespace detail {

inline std::string shape(int64_t rows, int64_t columns) {
  return std::string("[").append(text(rows)).append(", ").append(text(columns)).append("]");
}

// Throws unless `tensor` is like `like`; {} passes.
inline void check_like(std::string_view function, std::string_view name, const Tokens& tensor,
                       std::string_view like_name, const Tokens& like) {
  require(!tensor || tensor.like(like), [&] {
    return std::string(function) + ": " + std::string(name) + " must be " +
           shape(like.rows(), like.columns()) + " like " + std::string(like_name) + ", got " +
           shape(tensor.rows(), tensor.columns());
  });
}

inline void check_per_row(std::string_view function, std::string_view name, const Tokens& tensor,
                          int64_t rows) {
  const int64_t size = tensor.rows() * tensor.columns();
  const bool vector = std::min(tensor.rows(), tensor.columns()) == 1 || size == 0;
  require(!tensor || (vector && size == rows), [&] {
    return std::string(function) + ": " + std::string(name) + " must be [" + text(rows) +
           "], got " + shape(tensor.rows(), tensor.columns());
  });
}

inline MutableArray output(Eigen::ArrayXXd& x) {
  return {.data = x.data(),
          .dtype = DType::float64,
          .row_stride = x.rowStride(),
          .column_stride = x.colStride()};
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

// ---- one-sample KL estimators (estimators/kl/forms.h): any expression of log_ratios -------------------

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
  detail::check_like("kl_report", "response_mask", response_mask, "log_ratios", log_ratios);
  return tether::kl_report(log_ratios.layout(), log_ratios.array(), response_mask.array(),
                             options);
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
    return "categorical_kl: log_p must be " + detail::shape(q.rows(), q.cols()) +
           " like log_q, got " + detail::shape(p.rows(), p.cols());
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

// ---- advantages (estimators/advantage/gae.h) --------------------------------------------------------

inline Eigen::ArrayXXd discounted_returns(const Tokens& rewards, const Tokens& response_mask,
                                          const DiscountedReturns& options = {},
                                          const Tokens& bootstrap = {}) {
  const auto function = "discounted_returns";
  detail::check_like(function, "response_mask", response_mask, "rewards", rewards);
  detail::check_per_row(function, "bootstrap", bootstrap, rewards.rows());
  Eigen::ArrayXXd out(rewards.rows(), rewards.columns());
  tether::discounted_returns(rewards.layout(), rewards.array(), response_mask.array(),
                             bootstrap ? bootstrap.per_row() : ConstArray{}, options,
                             detail::output(out));
  return out;
}

struct AdvantagesAndReturns {
  Eigen::ArrayXXd advantages;
  Eigen::ArrayXXd returns;
};

// What may come beside rewards, values and mask; {} is absent.
struct GaeExtras {
  Tokens bootstrap = {};             // [B]
  Tokens done = {}, truncated = {};  // [B, T]
  Tokens truncation_values = {};     // [B, T], needed with truncated
  Tokens lambdas = {};               // [B, T]
};

inline AdvantagesAndReturns generalized_advantage_estimation(const Tokens& rewards,
                                                             const Tokens& values,
                                                             const Tokens& response_mask,
                                                             const Gae& options = {},
                                                             const GaeExtras& extras = {}) {
  const auto function = "generalized_advantage_estimation";
  const auto like = [&](std::string_view name, const Tokens& tensor) {
    detail::check_like(function, name, tensor, "rewards", rewards);
  };
  like("values", values);
  like("response_mask", response_mask);
  like("done", extras.done);
  like("truncated", extras.truncated);
  like("truncation_values", extras.truncation_values);
  like("lambdas", extras.lambdas);
  detail::check_per_row(function, "bootstrap", extras.bootstrap, rewards.rows());
  const GaeArrays arrays{.layout = rewards.layout(),
                         .rewards = rewards.array(),
                         .values = values.array(),
                         .response_mask = response_mask.array(),
                         .bootstrap = extras.bootstrap ? extras.bootstrap.per_row() : ConstArray{},
                         .done = extras.done.array(),
                         .truncated = extras.truncated.array(),
                         .truncation_values = extras.truncation_values.array(),
                         .lambdas = extras.lambdas.array()};
  AdvantagesAndReturns out{{rewards.rows(), rewards.columns()},
                           {rewards.rows(), rewards.columns()}};
  tether::generalized_advantage_estimation(arrays, options, detail::output(out.advantages),
                                           detail::output(out.returns));
  return out;
}

// Groups of `group_size` consecutive rewards, or by id.
inline Eigen::ArrayXd group_advantage(const Eigen::Ref<const Eigen::ArrayXd>& rewards,
                                      int64_t group_size, const GroupAdvantage& options = {}) {
  Eigen::ArrayXd out(rewards.size());
  tether::group_advantage(rewards.data(), rewards.size(), group_size, options, out.data());
  return out;
}
inline Eigen::ArrayXd group_advantage(
    const Eigen::Ref<const Eigen::ArrayXd>& rewards,
    const Eigen::Ref<const Eigen::Array<int64_t, Eigen::Dynamic, 1>>& group_ids,
    const GroupAdvantage& options = {}) {
  require(group_ids.size() == rewards.size(), [&] {
    return "group_advantage: group_ids must be [" + text(int64_t(rewards.size())) +
           "] like rewards, got [" + text(int64_t(group_ids.size())) + "]";
  });
  Eigen::ArrayXd out(rewards.size());
  tether::group_advantage(rewards.data(), group_ids.data(), rewards.size(), options, out.data());
  return out;
}

// ---- whitening (estimators/advantage/whitening.h) ---------------------------------------------------------

inline Moments moments(const Tokens& values, const Tokens& response_mask) {
  detail::check_like("moments", "response_mask", response_mask, "values", values);
  return tether::moments(values.layout(), values.array(), response_mask.array());
}

// With the moments of the whole step, from the caller.
inline Eigen::ArrayXXd whiten(const Tokens& values, const Tokens& response_mask,
                              const Moments& step, const Whitening& options = {}) {
  detail::check_like("whiten", "response_mask", response_mask, "values", values);
  Eigen::ArrayXXd out(values.rows(), values.columns());
  tether::whiten(values.layout(), values.array(), response_mask.array(), step, options,
                 detail::output(out));
  return out;
}
// With those of these values.
inline Eigen::ArrayXXd whiten(const Tokens& values, const Tokens& response_mask,
                              const Whitening& options = {}) {
  return whiten(values, response_mask, moments(values, response_mask), options);
}

}  // namespace tether::eigen
