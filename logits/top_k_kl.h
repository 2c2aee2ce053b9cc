#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "../core/fields.h"
#include "../core/number.h"
#include "../core/options.h"
#include "../core/parallel.h"
#include "../estimators/kl/forms.h"
#include "rows.h"

namespace tether {

// KL(q || p) [nats] of one position from a head S of outcomes, mostly the k most probable ones, for
// which both log-probabilities are known, and, for the tail of all others, from one sample y ~ q.
// The reference p need not be stored beyond them.
//
//   u = log q - log p,   Q, P = 1 - sum_S q, 1 - sum_S p
//   bucket   B = sum_S q u + Q log(Q / P)       all of the tail as one outcome: a lower bound, >= 0
//   k1       B + [y not in S] (u_y - log(Q / P))            unbiased, any sign
//   k3       B + [y not in S] k3(log(Q / P) - u_y)          unbiased, >= 0
//   reverse_bucket   -sum_S p u - P log(Q / P)       the bucket of KL(p || q), likewise, >= 0
//
// The gradient of k1 and k3 is, in expectation, that of KL(q || p): the weight q_y / q_y in
// front of [y not in S] is part of the graph. That of a bucket is not. k3 has the smaller
// variance where the tails are alike, k1 where P is much larger than Q. An empty head gives k1 and
// k3 themselves, a head of the whole vocabulary the exact divergence. k3 divides by P, the rest of
// rounded numbers: where P is not much larger than `precision`, it is biased by up to Q; k1 is not.
// What the largest q or p of the head leaves of 1 is taken without loss and the others from that: P
// is off by no more than 2^-24 (1 + max_S |log p|) of it, where p is of float32.
// A log-probability of -inf is a mass of 0; NaN or +inf in one of them, or a row of q that is NaN
// (logits/rows.h), make the row NaN. A sample outside the head with a logit of -inf, which q cannot
// have drawn, makes k1 and k3 NaN; finite input gives no NaN.
// Sampled tails: arXiv:2602.04417; k3 within the tail is not in it.
enum class TailEstimate { bucket, k1, k3, reverse_bucket };
inline constexpr std::array<std::string_view, 4> kTailEstimateNames{"bucket", "k1", "k3",
                                                                    "reverse_bucket"};

// Whether it takes a sample of q.
constexpr bool is_sampled(TailEstimate tail) {
  return tail == TailEstimate::k1 || tail == TailEstimate::k3;
}

// q u, for the log-probabilities of an outcome of the head; 0 where q is. Of the reverse: with p
// and q exchanged.
template <class Number, class Constant>
TETHER_INLINE Number head_kl(const Number& log_q, const Constant& log_p) {
  constexpr double kNone = -600;  // e^-600 is 0
  const auto q = max(log_q, kNone);
  return exp(q) * (q - select(log_q < kNone, stop_gradient(q), log_p));
}

// What the tail adds. Masses below `least`, where they are nothing but the rounding of the
// log-probabilities that they are the rest of, count as this. inside: y is in the head.
// saturation: of the log-ratio d in k3, beyond which the slope is that at the bound.
//
// With the weight in the graph, the derivative of k3 by log q_y is k3(d) - (e^d - 1) = -d: written
// so, since the difference loses it where e^d is large.
template <class Number, class Constant, class Condition>
TETHER_INLINE Number tail_kl(TailEstimate estimate, const Number& mass_q, const Constant& mass_p,
                             double least, double saturation, const Number& log_q_y,
                             const Constant& log_p_y, const Condition& inside) {
  const auto mass = max(mass_q, least);
  const auto of_p = max(mass_p, least);
  const auto gap = log(mass) - log(of_p);
  if (estimate == TailEstimate::reverse_bucket) return -of_p * gap;
  const auto bucket = mass * gap;
  if (estimate == TailEstimate::bucket) return bucket;
  const auto nothing = stop_gradient(mass) * 0.0;
  if (estimate == TailEstimate::k1) {
    const auto weight = exp(log_q_y - stop_gradient(log_q_y));
    return bucket + select(inside, nothing, weight * (log_q_y - log_p_y - gap));
  }
  const auto d = gap - (stop_gradient(log_q_y) - log_p_y);
  const auto sampled = k3(with_gradient_of(min(d, saturation), d));
  return bucket +
         select(inside, nothing, with_gradient_of(sampled, sampled - log_q_y * stop_gradient(d)));
}

// Rows of q, with what is known of p.
struct TopKHeads {
  ConstLogits q;                    // [rows, V]
  int64_t size = 0;                 // k >= 0
  const int64_t* ids = nullptr;     // [rows, k], those of a row all different
  const double* p_logps = nullptr;  // [rows, k]
  // The samples. Without (null) there is only the bucket; an ignored row is not read and gives 0.
  const int64_t* targets = nullptr;        // [rows]
  const double* p_target_logps = nullptr;  // [rows]
};

struct TopKKlOptions {
  double temperature = 1;  // of q's logits
  TailEstimate tail = TailEstimate::k3;
  int64_t ignore_index = -100;
  double precision = 0x1p-23;  // of p_logps; the least mass of a tail

  static constexpr auto fields() {
    return std::tuple{field("temperature", &TopKKlOptions::temperature, Range{1e-6, 1e6}),
                      field("precision", &TopKKlOptions::precision, Range{0x1p-52, 0x1p-8})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("tail", &TopKKlOptions::tail, kTailEstimateNames)};
  }
};

// kl[r] of every row, never negative but with TailEstimate::k1; one pass over the logits of q.
// Leaves the rows' statistics for the gradients. Ids are checked before any logit is read.
void top_k_kl(const TopKHeads& heads, const TopKKlOptions& options, RowStatistics* statistics,
              double* kl, const Executor& executor = {});

// dq = upstream[r] dkl[r]/dq, one pass more, rounded once. A row whose upstream is exactly 0 gets
// exact zeros and is not read. dq may be q itself (in place).
void top_k_kl_gradients(const TopKHeads& heads, const TopKKlOptions& options,
                        const RowStatistics* statistics, const double* upstream,
                        const MutableLogits& dq, const Executor& executor = {});

}  // namespace tether
