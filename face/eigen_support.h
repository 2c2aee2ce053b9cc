#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../logits/support.h"
#include "eigen_estimators.h"
#include "in_words_of.h"

// Log-probabilities, entropies and divergences over the ids that a sampler kept (logits/support.h),
// on Eigen arrays of logits [N, V], of any storage order and strides. Rows ignored by their target
// are not read and give zeros.
//
//   const tether::eigen::KeptIds kept{.ids = top_k};  // [N, K], padded with -1
//   const auto out = tether::eigen::token_logps(logits, targets, kept);
//   const Eigen::ArrayXXd dlogits = token_logps_gradient(logits, targets, kept, out, dlogps);

namespace tether::eigen {

using Targets = Eigen::Array<int64_t, Eigen::Dynamic, 1>;

// ids: int32 or int64; padded [N, K] with -1 or, with offsets [N + 1], [M, 1], those of one row
// after the other.
struct KeptIds {
  Tokens ids;
  Targets offsets = {};
};

struct SupportLogps {
  Eigen::ArrayXd logps, entropies;
  Eigen::Array<bool, Eigen::Dynamic, 1> added;  // the set lacked the target
  int64_t count_added;
  std::vector<RowStatistics> statistics;
};

// KL(q || p), KL(p || q) and H(q) of every row.
struct SupportKl {
  Eigen::ArrayXd kl, reverse_kl, entropies;
  std::vector<KlStatistics> statistics;
};

// Gradients of a loss, by the values of a SupportKl or by logits.
struct SupportKlUpstream {
  Eigen::ArrayXd kl, reverse_kl, entropies;  // an empty one is 0
};
struct SupportKlGradients {
  Eigen::ArrayXXd q, p;
};

namespace detail {

inline ConstLogits rows_of(const Tokens& x) {
  return {.data = x.const_data_ptr(),
          .dtype = x.scalar_type(),
          .rows = x.rows(),
          .vocabulary = x.columns(),
          .row_stride = x.stride(0),
          .stride = x.stride(1)};
}

inline void check_size(std::string_view function, std::string_view name, Eigen::Index size,
                       int64_t rows) {
  require(size == rows, [&] {
    return named(function, name) + " must be " + in_brackets(text(rows)) + ", got " +
           in_brackets(text(int64_t(size)));
  });
}

// Refers to its arrays.
inline tether::KeptIds kept_of(std::string_view function, const KeptIds& kept, int64_t rows) {
  RowLayout layout{.rows = kept.ids.rows(), .columns = kept.ids.columns()};
  if (kept.offsets.size() > 0) {
    check_size(function, "offsets", kept.offsets.size(), rows + 1);
    layout = {.rows = rows, .offsets64 = kept.offsets.data()};
    check_layout(function, layout);
    require(kept.ids.columns() == 1, [&] {
      return named(function, "ids") + " must be [M, 1] with offsets, got " +
             face::shape_text(kept.ids);
    });
    const int64_t first = layout.offset(0), last = layout.offset(rows);
    require(first == 0 && last == kept.ids.rows(), [&] {
      return named(function, "offsets") + " must run from 0 to " + text(kept.ids.rows()) +
             ", the size of ids, got " + text(first) + " to " + text(last);
    });
  }
  const bool packed = layout.packed();
  return {layout,
          {.data = kept.ids.const_data_ptr(),
           .dtype = kept.ids.scalar_type(),
           .row_stride = packed ? 0 : kept.ids.stride(0),
           .column_stride = packed ? kept.ids.stride(0) : kept.ids.stride(1)}};
}

// What fill(logits) writes into memory of the type of x, in double.
template <class Fill>
Eigen::ArrayXXd gradient_like(const Tokens& x, Fill fill) {
  const auto in = [&]<class Scalar>(Scalar) -> Eigen::ArrayXXd {
    Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> out(x.rows(),
                                                                              x.columns());
    fill(MutableLogits{.data = out.data(),
                       .dtype = x.scalar_type(),
                       .rows = x.rows(),
                       .vocabulary = x.columns(),
                       .row_stride = x.columns()});
    return out.template cast<double>();
  };
  return x.scalar_type() == DType::float64 ? in(double{}) : in(float{});
}

inline const double* data_of(std::string_view function, std::string_view name,
                             const Eigen::ArrayXd& upstream, int64_t rows) {
  if (upstream.size() == 0) return nullptr;
  check_size(function, name, upstream.size(), rows);
  return upstream.data();
}

}  // namespace detail

inline SupportLogps token_logps(const Tokens& logits, const Targets& targets, const KeptIds& kept,
                                const RowOptions& options = {}) {
  const std::string_view function = "token_logps";
  const int64_t rows = logits.rows();
  detail::check_size(function, "targets", targets.size(), rows);
  SupportLogps out{
      Eigen::ArrayXd(rows), Eigen::ArrayXd(rows), {}, 0, std::vector<RowStatistics>(size_t(rows))};
  out.added.resize(rows);
  std::vector<uint8_t> added(static_cast<size_t>(rows));
  out.count_added = face::in_words_of(function, "ids", [&] {
    return support_statistics(detail::rows_of(logits), targets.data(),
                              detail::kept_of(function, kept, rows), options, out.statistics.data(),
                              added.data());
  });
  for (int64_t row = 0; row < rows; ++row) {
    const RowStatistics& of_row = out.statistics[size_t(row)];
    out.logps(row) = logp(of_row, options);
    out.entropies(row) = entropy(of_row);
    out.added(row) = added[size_t(row)] != 0;
  }
  return out;
}

// Of a loss with these gradients by logps and entropies [N]; an empty one is 0.
inline Eigen::ArrayXXd token_logps_gradient(const Tokens& logits, const Targets& targets,
                                            const KeptIds& kept, const SupportLogps& of,
                                            const Eigen::ArrayXd& dlogps,
                                            const Eigen::ArrayXd& dentropies = {},
                                            const RowOptions& options = {}) {
  const std::string_view function = "token_logps_gradient";
  const int64_t rows = logits.rows();
  detail::check_size(function, "targets", targets.size(), rows);
  detail::check_size(function, "statistics", std::ssize(of.statistics), rows);
  return detail::gradient_like(logits, [&](const MutableLogits& out) {
    face::in_words_of(function, "ids", [&] {
      support_gradients(detail::rows_of(logits), targets.data(),
                        detail::kept_of(function, kept, rows), options, of.statistics.data(),
                        detail::data_of(function, "dlogps", dlogps, rows),
                        detail::data_of(function, "dentropies", dentropies, rows), out);
    });
  });
}

// Of the softmaxes of two rows of logits over the same ids. targets: empty, or [N] ids that belong
// to the sets, and ignore_index.
inline SupportKl categorical_kl(const Tokens& q, const Tokens& p, const KeptIds& kept,
                                const Targets& targets = {}, const SupportKlOptions& options = {}) {
  const std::string_view function = "categorical_kl";
  const int64_t rows = q.rows();
  if (targets.size() > 0) detail::check_size(function, "targets", targets.size(), rows);
  SupportKl out{Eigen::ArrayXd(rows), Eigen::ArrayXd(rows), Eigen::ArrayXd(rows),
                std::vector<KlStatistics>(size_t(rows))};
  face::in_words_of(function, "ids", [&] {
    support_kl_statistics(detail::rows_of(q), detail::rows_of(p),
                          targets.size() > 0 ? targets.data() : nullptr,
                          detail::kept_of(function, kept, rows), options, out.statistics.data());
  });
  for (int64_t row = 0; row < rows; ++row) {
    const LogitsKl values = logits_kl(out.statistics[size_t(row)]);
    out.kl(row) = values.kl;
    out.reverse_kl(row) = values.reverse_kl;
    out.entropies(row) = values.entropy;
  }
  return out;
}

inline SupportKlGradients categorical_kl_gradient(const Tokens& q, const Tokens& p,
                                                  const KeptIds& kept, const SupportKl& of,
                                                  const SupportKlUpstream& upstream,
                                                  const Targets& targets = {},
                                                  const SupportKlOptions& options = {}) {
  const std::string_view function = "categorical_kl_gradient";
  const int64_t rows = q.rows();
  if (targets.size() > 0) detail::check_size(function, "targets", targets.size(), rows);
  detail::check_size(function, "statistics", std::ssize(of.statistics), rows);
  const double *kl = detail::data_of(function, "upstream.kl", upstream.kl, rows),
               *reverse_kl =
                   detail::data_of(function, "upstream.reverse_kl", upstream.reverse_kl, rows),
               *entropies =
                   detail::data_of(function, "upstream.entropies", upstream.entropies, rows);
  std::vector<LogitsKl> factors(static_cast<size_t>(rows));
  for (size_t row = 0; row < factors.size(); ++row) {
    if (kl != nullptr) factors[row].kl = kl[row];
    if (reverse_kl != nullptr) factors[row].reverse_kl = reverse_kl[row];
    if (entropies != nullptr) factors[row].entropy = entropies[row];
  }
  SupportKlGradients out;
  out.q = detail::gradient_like(q, [&](const MutableLogits& dq) {
    out.p = detail::gradient_like(p, [&](const MutableLogits& dp) {
      face::in_words_of(function, "ids", [&] {
        support_kl_gradients(detail::rows_of(q), detail::rows_of(p),
                             targets.size() > 0 ? targets.data() : nullptr,
                             detail::kept_of(function, kept, rows), options, of.statistics.data(),
                             factors.data(), dq, dp);
      });
    });
  });
  return out;
}

}  // namespace tether::eigen
