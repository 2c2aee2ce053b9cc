#include "logits/top_k_kl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>
#include <vector>

#include "estimators/kl/exact.h"
#include "tests/error_message.h"
#include "tests/logits/rows_reference.h"

namespace tether {
namespace {

using namespace rows_test;

constexpr TailEstimate kTails[] = {TailEstimate::bucket, TailEstimate::k1, TailEstimate::k3,
                                   TailEstimate::reverse_bucket};

struct Case {
  DType dtype = DType::float64;
  int64_t rows = 1, vocabulary = 0, size = 0;
  Doubles q = {}, log_p = {};  // logits of q, log-probabilities of p: [rows, V]
  std::vector<int64_t> ids = {}, targets = {};
  TopKKlOptions options = {.precision = 0x1p-52};
  Doubles upstream = {};
};

Doubles log_softmax(const Doubles& logits, int64_t vocabulary, double temperature) {
  Doubles out = logits;
  for (size_t begin = 0; begin < out.size(); begin += static_cast<size_t>(vocabulary)) {
    const auto first = out.begin() + static_cast<int64_t>(begin), last = first + vocabulary;
    for (auto x = first; x != last; ++x) *x /= temperature;
    const double max = *std::max_element(first, last);
    double sum = 0;
    for (auto x = first; x != last; ++x) sum += std::exp(*x - max);
    for (auto x = first; x != last; ++x) *x -= max + std::log(sum);
  }
  return out;
}

// The most probable ids of q; targets in turn inside and outside of them.
Case random_case(DType dtype, int64_t rows, int64_t vocabulary, int64_t size, double gap) {
  Case out{.dtype = dtype, .rows = rows, .vocabulary = vocabulary, .size = size};
  Memory stored(dtype, normal(rows * vocabulary, 2, 1));
  out.q = stored.values(rows * vocabulary);
  out.log_p = normal(rows * vocabulary, gap, 2);
  for (size_t i = 0; i < out.q.size(); ++i) out.log_p[i] += out.q[i];
  out.log_p = log_softmax(out.log_p, vocabulary, 1);
  out.upstream = normal(rows, 1, 3);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<int64_t> order(static_cast<size_t>(vocabulary));
    std::iota(order.begin(), order.end(), 0);
    const double* x = out.q.data() + row * vocabulary;
    std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return x[a] > x[b]; });
    out.ids.insert(out.ids.end(), order.begin(), order.begin() + size);
    const int64_t place = row % 2 == 0 ? size : size - 1;
    out.targets.push_back(order[size_t(std::clamp<int64_t>(place, 0, vocabulary - 1))]);
  }
  return out;
}

struct CaseResult {
  Doubles kl, dq;
};

// The arrays of p, at the ids.
struct Views {
  Doubles head, target;

  explicit Views(const Case& in) {
    for (size_t i = 0; i < in.ids.size(); ++i) {
      const auto row = static_cast<int64_t>(i) / in.size;
      head.push_back(in.log_p[size_t(row * in.vocabulary + in.ids[i])]);
    }
    for (int64_t row = 0; row < in.rows; ++row) {
      const int64_t id = in.targets[size_t(row)];
      target.push_back(id < 0 ? kNan : in.log_p[size_t(row * in.vocabulary + id)]);
    }
  }
  TopKHeads of(const Case& in, const ConstLogits& q) const {
    return {.q = q,
            .size = in.size,
            .ids = in.ids.data(),
            .p_logps = head.data(),
            .targets = in.targets.data(),
            .p_target_logps = target.data()};
  }
};

CaseResult run(const Case& in, bool in_place = false, const Executor& executor = {}) {
  const Views views(in);
  Memory q(in.dtype, in.q), dq(in.dtype, in.rows * in.vocabulary);
  const ConstLogits logits{q.words.data(), in.dtype, in.rows, in.vocabulary, in.vocabulary};
  Memory& out = in_place ? q : dq;
  std::vector<RowStatistics> statistics(static_cast<size_t>(in.rows));
  CaseResult result{.kl = Doubles(static_cast<size_t>(in.rows)), .dq = {}};
  top_k_kl(views.of(in, logits), in.options, statistics.data(), result.kl.data(), executor);
  top_k_kl_gradients(views.of(in, logits), in.options, statistics.data(), in.upstream.data(),
                     {out.words.data(), in.dtype, in.rows, in.vocabulary, in.vocabulary}, executor);
  result.dq = out.values(in.rows * in.vocabulary);
  return result;
}

// The formula, in long double and in its own words. `frozen`: log q_y in the denominator of the
// weight.
long double definition(const Case& in, int64_t row, const Doubles& log_q, double frozen) {
  const double* q = log_q.data() + row * in.vocabulary;
  const double* p = in.log_p.data() + row * in.vocabulary;
  const bool reverse = in.options.tail == TailEstimate::reverse_bucket;
  long double head = 0, mass_q = 0, mass_p = 0;
  for (int64_t v = 0; v < in.vocabulary; ++v) {
    const auto begin = in.ids.begin() + row * in.size;
    if (std::find(begin, begin + in.size, v) != begin + in.size) {
      const long double u = (long double)q[v] - p[v];
      head += reverse ? -std::exp((long double)p[v]) * u : std::exp((long double)q[v]) * u;
    } else {
      mass_q += std::exp((long double)q[v]);
      mass_p += std::exp((long double)p[v]);
    }
  }
  const long double gap = mass_q > 0 ? std::log(mass_q / mass_p) : 0;
  if (reverse) return head - mass_p * gap;
  const long double bucket = head + mass_q * gap;
  const int64_t y = in.targets[size_t(row)];
  const auto begin = in.ids.begin() + row * in.size;
  const bool inside = std::find(begin, begin + in.size, y) != begin + in.size;
  if (inside || in.options.tail == TailEstimate::bucket) return bucket;
  const long double u = (long double)q[y] - p[y], weight = std::exp((long double)q[y] - frozen);
  if (in.options.tail == TailEstimate::k1) return bucket + weight * (u - gap);
  return bucket + weight * (std::expm1(gap - u) - (gap - u));
}

double tail_mass(const Case& in, int64_t row, const Doubles& log_q) {
  double mass = 1;
  for (int64_t i = row * in.size; i < (row + 1) * in.size; ++i) {
    mass -= std::exp(log_q[size_t(row * in.vocabulary + in.ids[size_t(i)])]);
  }
  return mass;
}

double frozen_of(const Case& in, int64_t row, const Doubles& log_q) {
  return log_q[size_t(row * in.vocabulary + in.targets[size_t(row)])];
}

TEST(TopKKl, TwoOfThreeByHand) {
  // q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2), head {0}: Q = 1/2, P = 3/4, log Q/P = log 2/3,
  // u = (log 2, 0, -log 2).
  Case in{.vocabulary = 3,
          .size = 1,
          .q = {std::log(0.5), std::log(0.25), std::log(0.25)},
          .log_p = {std::log(0.25), std::log(0.25), std::log(0.5)},
          .ids = {0},
          .targets = {2},
          .upstream = {1}};
  const double gap = std::log(2.0 / 3), bucket = 0.5 * std::log(2.0) + 0.5 * gap;
  const double u = -std::log(2.0), d = gap - u;
  in.options.tail = TailEstimate::bucket;
  EXPECT_NEAR(run(in).kl[0], bucket, 1e-15);
  in.options.tail = TailEstimate::k1;
  EXPECT_NEAR(run(in).kl[0], bucket + u - gap, 1e-15);
  in.options.tail = TailEstimate::k3;
  EXPECT_NEAR(run(in).kl[0], bucket + (4.0 / 3 - 1 - d), 1e-15);
  // 1/4 log (1/4 / 1/2) + 3/4 log 3/2, with the slopes 1/2 - 1/4 of q_0 and (1/4) (1 - 3/2).
  in.options.tail = TailEstimate::reverse_bucket;
  EXPECT_NEAR(run(in).kl[0], 0.75 * std::log(1.5) - 0.25 * std::log(2.0), 1e-15);
  EXPECT_NEAR(run(in).dq[0], 0.25, 1e-15);
  EXPECT_NEAR(run(in).dq[1], -0.125, 1e-15);
  in.options.tail = TailEstimate::k3;
  in.targets = {0};  // inside: nothing is sampled
  EXPECT_NEAR(run(in).kl[0], bucket, 1e-15);
}

TEST(TopKKl, MatchesTheDefinition) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {5, 33, 3000}) {
      for (TailEstimate tail : kTails) {
        Case in = random_case(dtype, 4, vocabulary, 4, 0.7);
        in.options.tail = tail;
        const Doubles log_q = log_softmax(in.q, vocabulary, 1);
        const CaseResult got = run(in);
        for (int64_t row = 0; row < in.rows; ++row) {
          const double want = double(definition(in, row, log_q, frozen_of(in, row, log_q)));
          // A mass is off by a few ulp of 1, its logarithm by 1 / mass of that.
          const double ulp = dtype == DType::float64 ? 0x1p-52 : 0x1p-23;
          const double bound = 16 * ulp * (8 + 1 / tail_mass(in, row, log_q));
          EXPECT_NEAR(got.kl[size_t(row)], want, bound) << name(dtype, vocabulary);
        }
      }
    }
  }
}

// Log-probabilities with the digits of a confident column's distance from 1.
Doubles precise_log_softmax(const Doubles& logits) {
  const auto top = std::max_element(logits.begin(), logits.end());
  long double rest = 0;
  for (auto x = logits.begin(); x != logits.end(); ++x) {
    if (x != top) rest += std::exp((long double)*x - *top);
  }
  Doubles out;
  for (const double x : logits) {
    out.push_back(double((long double)x - *top - std::log1p(rest)));
  }
  return out;
}

// The masses of the tails are what the largest of the head leaves of 1, less the others: off by the
// rounding of the log-probabilities, which is relative to that.
TEST(TopKKl, TailsOfConfidentHeadsKeepTheirDigits) {
  for (DType dtype : kAllTypes) {
    for (double distance : {10.0, 20.0, 30.0}) {
      for (bool rounded : {false, true}) {  // p is of float32
        Case in{.dtype = dtype, .vocabulary = 60, .size = 4, .ids = {3, 7, 9, 12}, .targets = {20}};
        in.upstream = {1};
        in.options.tail = TailEstimate::k1;
        Doubles p = normal(60, 0.5, 2);
        in.q = normal(60, 0.5, 1);
        in.q[7] = p[7] = distance;
        in.q = Memory(dtype, in.q).values(60);
        const Doubles log_q = precise_log_softmax(in.q);
        in.log_p = precise_log_softmax(p);
        const double want = double(definition(in, 0, log_q, log_q[20]));
        for (double& each : in.log_p) each = rounded ? float(each) : each;
        const double ulp = rounded || dtype != DType::float64 ? 0x1p-23 : 0x1p-52;
        EXPECT_NEAR(run(in).kl[0], want, 8 * ulp * (4 + distance))
            << name(dtype, 60) << ", distance " << distance;
      }
    }
  }
}

// The gradient of a column that has most of the row is minus the sum of the others'.
TEST(TopKKl, ConfidentColumnsKeepTheDigitsOfTheirGradients) {
  for (TailEstimate tail : kTails) {
    for (double distance : {1.0, 20.0, 30.0}) {
      Case in{.vocabulary = 60, .size = 4, .ids = {3, 7, 9, 12}, .targets = {9}};
      in.upstream = {1};
      in.options.tail = tail;
      Doubles p = normal(60, 0.5, 2);
      in.q = normal(60, 0.5, 1);
      in.q[7] = p[7] = distance + 4;
      in.log_p = precise_log_softmax(p);
      const Doubles dq = run(in).dq;
      double others = 0, size = 0;
      for (size_t v = 0; v < 60; ++v) {
        if (v == 7) continue;
        others += dq[v];
        size += std::abs(dq[v]);
      }
      EXPECT_NEAR(dq[7], -others, 1e-13 * size) << distance;
    }
  }
}

TEST(TopKKl, GradientIsTheDerivativeOfTheWeightedValue) {
  for (TailEstimate tail : kTails) {
    Case in = random_case(DType::float64, 4, 12, 3, 0.7);
    in.options.tail = tail;
    in.options.temperature = 0.7;
    const Doubles dq = run(in).dq;
    const Doubles at = log_softmax(in.q, 12, 0.7);
    for (size_t i = 0; i < in.q.size(); ++i) {
      const auto row = static_cast<int64_t>(i) / 12;
      const auto shifted = [&](double step) {
        Doubles q = in.q;
        q[i] += step;
        return definition(in, row, log_softmax(q, 12, 0.7), frozen_of(in, row, at));
      };
      const double slope = double((shifted(1e-5) - shifted(-1e-5)) / 2e-5L);
      EXPECT_NEAR(dq[i], in.upstream[size_t(row)] * slope, 2e-9) << i;
    }
  }
}

TEST(TopKKl, GradientOfEveryType) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (TailEstimate tail : kTails) {
      Case in = random_case(dtype, 4, 3000, 20, 0.5);
      in.options.tail = tail;
      Case wide = in;
      wide.dtype = DType::float64;
      const Doubles got = run(in).dq, want = run(wide).dq;
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_NEAR(got[i], want[i], 2e-6 + rounding(dtype, want[i])) << i;
      }
    }
  }
}

TEST(TopKKl, WholeVocabularyIsExactAndAnEmptyHeadIsTheEstimator) {
  Case in = random_case(DType::float64, 1, 9, 9, 1);
  const Doubles log_q = log_softmax(in.q, 9, 1);
  Doubles gradient(9);
  const double exact = categorical_kl(log_q.data(), in.log_p.data(), 9, gradient.data());
  in.upstream = {1};
  for (TailEstimate tail : {TailEstimate::bucket, TailEstimate::k1, TailEstimate::k3}) {
    in.options.tail = tail;
    const CaseResult got = run(in);
    EXPECT_NEAR(got.kl[0], exact, 1e-14);
    for (size_t v = 0; v < 9; ++v) EXPECT_NEAR(got.dq[v], gradient[v], 1e-13);
  }
  Case empty = random_case(DType::float64, 1, 9, 0, 1);
  const double d = empty.log_p[size_t(empty.targets[0])] - log_q[size_t(empty.targets[0])];
  empty.options.tail = TailEstimate::bucket;
  EXPECT_EQ(run(empty).kl[0], 0);
  empty.options.tail = TailEstimate::k1;
  EXPECT_NEAR(run(empty).kl[0], -d, 1e-14);
  empty.options.tail = TailEstimate::k3;
  EXPECT_NEAR(run(empty).kl[0], std::expm1(d) - d, 1e-14);
}

TEST(TopKKl, RoundedMassesAddNothing) {
  // Of a row that is all head, in the precision of float32, the tail is rounding.
  Case in = random_case(DType::float64, 50, 40, 39, 0);
  in.options.precision = 0x1p-23;
  for (int64_t row = 0; row < 50; ++row) {
    const auto ids = in.ids.begin() + row * 39;
    for (int64_t v = 0; v < 40; ++v) {
      const bool head = std::find(ids, ids + 39, v) != ids + 39;
      if (!head) in.q[size_t(row * 40 + v)] = in.log_p[size_t(row * 40 + v)] = -60;
    }
    in.targets[size_t(row)] = ids[0];
  }
  in.log_p = log_softmax(in.log_p, 40, 1);
  for (double& logp : in.log_p) logp = static_cast<float>(logp);
  for (TailEstimate tail : kTails) {
    in.options.tail = tail;
    const CaseResult got = run(in);
    for (const double kl : got.kl) {  // p is q, rounded
      EXPECT_NEAR(kl, 0, 1e-6);
      EXPECT_TRUE(kl >= 0 || tail == TailEstimate::k1) << kl;
    }
    for (const double each : got.dq) EXPECT_NEAR(each, 0, 2e-6);
  }
}

// A sample that q has left: pulled back by -d, at any distance; the value saturates.
TEST(TopKKl, RunawaySamplesArePulledBack) {
  for (DType dtype : kAllTypes) {
    for (double y : {20.0, 30.0, 45.0, 80.0, 200.0}) {
      const Case in{.dtype = dtype,
                    .vocabulary = 3,
                    .size = 1,
                    .q = {0, -3, -y},
                    .log_p = {-2, -3, -1},
                    .ids = {0},
                    .targets = {2},
                    .upstream = {1}};
      const double log_q = -y - std::log1p(std::exp(-3.0) + std::exp(-y));
      const double mass = 1 - 1 / (1 + std::exp(-3.0) + std::exp(-y));
      const double d = std::log(mass) - std::log1p(-std::exp(-2.0)) - (log_q + 1);
      const double bound = dtype == DType::float64 ? 600 : 60;
      const CaseResult got = run(in);
      EXPECT_TRUE(std::isfinite(static_cast<float>(got.kl[0])) || dtype == DType::float64);
      EXPECT_NEAR(got.kl[0] / (std::exp(std::min(d, bound)) - d), 1, 1e-3) << y;
      // Through the masses: q_y e^d times q_0 / Q, which is p_y q_0 / P below the saturation.
      const double through = std::exp(-1) * (1 - mass) / -std::expm1(-2.0);
      const double slope = -d + (d < bound ? through : 0);
      EXPECT_NEAR(got.dq[2], slope, 1e-3 + 2 * rounding(dtype, slope)) << y;
      for (const double each : got.dq) EXPECT_TRUE(std::isfinite(each) || dtype == DType::float16);
    }
  }
}

TEST(TopKKl, NoRowsIsFine) {
  for (TailEstimate tail : kTails) {
    const TopKHeads none{.q = {nullptr, DType::float32, 0, 5, 5}, .size = 2};
    top_k_kl(none, {.tail = tail}, nullptr, nullptr);
    top_k_kl_gradients(none, {.tail = tail}, nullptr, nullptr, {nullptr, DType::float32, 0, 5, 5});
  }
}

TEST(TopKKl, CertainRowsAreFinite) {
  // All of q in the head, to the last bit; p is not, and what it has in the tail counts.
  Case in{.vocabulary = 4,
          .size = 1,
          .q = {100, 0, 0, 0},
          .log_p = log_softmax({1, 0, 0, 0}, 4, 1),
          .ids = {0},
          .targets = {0},
          .upstream = {1}};
  for (TailEstimate tail : kTails) {
    in.options.tail = tail;
    const CaseResult got = run(in);
    const double p = std::exp(in.log_p[0]), rest = 1 - p;
    const double reverse = p * in.log_p[0] + rest * std::log(rest * 0x1p52);
    const bool is_reverse = tail == TailEstimate::reverse_bucket;
    EXPECT_NEAR(got.kl[0], is_reverse ? reverse : -in.log_p[0], 1e-13);
    for (const double each : got.dq) EXPECT_NEAR(each, 0, 1e-13);
  }
}

TEST(TopKKl, MinusInfinity) {
  // In the head of both: not there. In that which is not averaged over alone: infinite.
  Case in = random_case(DType::float64, 2, 20, 4, 0.5);
  Case without = in;
  const auto at = [&](int64_t row, int64_t i) {
    return size_t(row * 20 + in.ids[size_t(row * 4 + i)]);
  };
  for (int64_t row : {0, 1}) {
    in.q[at(row, 3)] = in.log_p[at(row, 3)] = -infinity;
    without.q[at(row, 3)] = -500;
    without.log_p[at(row, 3)] = -500;
  }
  in.targets = without.targets = {in.ids[0], in.ids[5]};
  for (TailEstimate tail : kTails) {
    in.options.tail = without.options.tail = tail;
    const CaseResult got = run(in), want = run(without);
    expect_near(got.kl, want.kl, 1e-14, "kl");
    for (size_t i = 0; i < got.dq.size(); ++i) EXPECT_NEAR(got.dq[i], want.dq[i], 1e-14) << i;
    EXPECT_EQ(got.dq[at(0, 3)], 0);
  }
  in.q[at(0, 3)] = 0;
  EXPECT_TRUE(std::isfinite(run(in).kl[0]));  // reversed
  in.options.tail = TailEstimate::k3;
  EXPECT_EQ(run(in).kl[0], infinity);
  EXPECT_TRUE(std::isfinite(run(in).kl[1]));
  std::swap(in.q[at(0, 3)], in.log_p[at(0, 3)]);
  EXPECT_TRUE(std::isfinite(run(in).kl[0]));
  in.options.tail = TailEstimate::reverse_bucket;
  EXPECT_EQ(run(in).kl[0], infinity);
  EXPECT_TRUE(std::isfinite(run(in).kl[1]));
}

// In any of its inputs, also where it would have met a probability of 0; the neighbours are as
// ever.
TEST(TopKKl, NanAndPlusInfinityMakeTheirRowNan) {
  const Case clean = random_case(DType::float64, 3, 20, 4, 0.5);
  for (double poison : {kNan, infinity}) {
    for (TailEstimate tail : kTails) {
      for (double logit : {0.0, -1e4, -infinity}) {  // of q where p is poisoned
        Case in = clean;
        in.options.tail = tail;
        const auto id = size_t(in.ids[5]);
        in.q[20 + id] = logit;
        in.log_p[20 + id] = poison;
        const CaseResult got = run(in);
        EXPECT_TRUE(std::isfinite(got.kl[0]) && std::isnan(got.kl[1]) && std::isfinite(got.kl[2]));
        for (size_t v = 0; v < 20; ++v) {
          EXPECT_TRUE(std::isfinite(got.dq[v]) && std::isfinite(got.dq[40 + v]));
          EXPECT_TRUE(std::isnan(got.dq[20 + v]) || in.q[20 + v] == -infinity) << v;
        }
      }
      for (const int64_t row : {0, 1}) {  // at the sample, outside and inside of the head
        Case in = clean;
        in.options.tail = tail;
        Views views(in);
        views.target[size_t(row)] = poison;
        Memory q(in.dtype, in.q);
        std::vector<RowStatistics> statistics(3);
        Doubles kl(3);
        top_k_kl(views.of(in, {q.words.data(), in.dtype, 3, 20, 20}), in.options, statistics.data(),
                 kl.data());
        EXPECT_EQ(std::isnan(kl[size_t(row)]), is_sampled(tail));
        EXPECT_TRUE(std::isfinite(kl[2]));
      }
      Case in = random_case(DType::float64, 2, 20, 0, 0.5);  // no head that would tell
      in.options.tail = tail;
      in.q[3] = poison;
      const CaseResult got = run(in);
      EXPECT_TRUE(std::isnan(got.kl[0]) && std::isfinite(got.kl[1]));
      for (size_t v = 0; v < 20; ++v) EXPECT_TRUE(std::isnan(got.dq[v])) << v;
    }
  }
}

TEST(TopKKl, AbsentColumnsHaveNoGradientUnderAnInfiniteOne) {
  for (DType dtype : kAllTypes) {
    for (TailEstimate tail : kTails) {
      Case in = random_case(dtype, 2, 300, 4, 0.5);
      in.options.tail = tail;
      in.upstream = {infinity, -infinity};
      for (size_t v : {size_t(in.ids[3]), 300 + size_t(in.ids[7])}) {
        in.q[v] = in.log_p[v] = -infinity;
      }
      for (size_t v = 0; v < 600; ++v) {
        const auto row = static_cast<int64_t>(v / 300), id = static_cast<int64_t>(v % 300);
        const auto begin = in.ids.begin() + 4 * row;
        const bool head = std::find(begin, begin + 4, id) != begin + 4;
        if (v % 7 == 0 && !head && in.targets[size_t(row)] != id) in.q[v] = -infinity;
      }
      in.targets[1] = in.ids[4];
      const CaseResult got = run(in);
      for (size_t v = 0; v < 600; ++v) {
        ASSERT_EQ(got.dq[v] == 0, in.q[v] == -infinity) << name(dtype, 300) << " " << v;
      }
    }
  }
}

TEST(TopKKl, GradientInPlaceIsTheSame) {
  for (DType dtype : kAllTypes) {
    const Case in = random_case(dtype, 3, 2500, 7, 0.5);
    EXPECT_EQ(run(in, true).dq, run(in).dq);
  }
}

TEST(TopKKl, AnyStridesGiveTheSameBits) {
  for (DType dtype : kAllTypes) {
    for (TailEstimate tail : kTails) {
      Case in = random_case(dtype, 6, 70, 5, 0.5);
      in.options.tail = tail;
      const CaseResult want = run(in);
      // Rows of [2, 3, V], both ways of different strides.
      ConstLogits q{nullptr, dtype, 6, 70, 3 * 70 + 5, 3, 3, 16 * 70};
      MutableLogits dq{nullptr, dtype, 6, 70, 2 * 70 + 3, 2, 3, 9 * 70};
      Memory logits(dtype, 40 * 70), gradient(dtype, Doubles(40 * 70, 7.0));
      for (int64_t i = 0; i < 6 * 70; ++i) {
        logits.set(size_t(q.offset(i / 70) + i % 70 * q.stride), in.q[size_t(i)]);
      }
      q.data = logits.words.data();
      dq.data = gradient.words.data();
      const Views views(in);
      std::vector<RowStatistics> statistics(6);
      Doubles kl(6);
      top_k_kl(views.of(in, q), in.options, statistics.data(), kl.data());
      top_k_kl_gradients(views.of(in, q), in.options, statistics.data(), in.upstream.data(), dq);
      EXPECT_EQ(kl, want.kl);
      int touched = 0;
      for (int64_t i = 0; i < 6 * 70; ++i) {
        const auto place = size_t(dq.offset(i / 70) + i % 70 * dq.stride);
        ASSERT_EQ(gradient.get(place), want.dq[size_t(i)]) << i;
      }
      for (double each : gradient.values(40 * 70)) touched += each != 7.0 ? 1 : 0;
      EXPECT_EQ(touched, 6 * 70);
    }
  }
}

// Of unequal p that sum to more than 1, of a sample that q has almost left, of logits at their
// ends.
TEST(TopKKl, FiniteInputGivesNoNan) {
  for (DType dtype : kAllTypes) {
    const double most = dtype == DType::float16   ? 65504
                        : dtype == DType::float64 ? std::numeric_limits<double>::max()
                                                  : 0x1.FEp127;
    for (TailEstimate tail : kTails) {
      for (double log_p : {0.0, -0.1, -1e4, -most}) {
        for (double y : {0.0, -700.0, -1e4, -most}) {
          for (double x : {0.0, 1.0, most}) {
            Case in{.dtype = dtype,
                    .vocabulary = 5,
                    .size = 2,
                    .q = {x, x, -1, y, -most},
                    .log_p = {log_p, log_p, -1, -1, log_p},
                    .ids = {0, 1},
                    .targets = {3}};
            in.options.tail = tail;
            for (const auto& ids : {std::vector<int64_t>{0, 1}, {3, 4}, {0, 3}, {2, 4}}) {
              in.ids = ids;
              for (double temperature : {1e-6, 1.0, 1e6}) {
                in.options.temperature = temperature;
                for (double upstream : {1.0, -1e30, most}) {
                  in.upstream = {upstream};
                  const CaseResult got = run(in);
                  const std::string what = name(dtype, 5) + ", log p " + text(log_p) + ", y " +
                                           text(y) + ", x " + text(x) + ", T " + text(temperature);
                  EXPECT_FALSE(std::isnan(got.kl[0])) << what;
                  for (double each : got.dq) EXPECT_FALSE(std::isnan(each)) << what;
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(TopKKl, FirstBadRowIsNamed) {
  // The place where an id stands a second time, in the first bad row, whatever the threads.
  Case in = random_case(DType::float32, 300, 900, 800, 0.5);
  in.ids[299 * 800 + 5] = -1;
  in.ids[123 * 800 + 700] = in.ids[123 * 800 + 3];
  in.ids[124 * 800 + 1] = 900;
  EXPECT_EQ(message([&] { run(in); }), "top_k_kl: head_ids must be all different in a row, got " +
                                           text(in.ids[123 * 800 + 3]) + " again at [123, 700]");
}

TEST(TopKKl, ThreadsChangeNoBit) {
  const Case in = random_case(DType::float32, 40, 900, 7, 0.5);
  const Executor threads{.run =
                             [](void*, int64_t tasks, Executor::Task task, void* argument) {
                               std::vector<std::thread> all;
                               for (int64_t i = tasks; i-- > 0;)
                                 all.emplace_back(task, argument, i);
                               for (std::thread& each : all) each.join();
                             },
                         .context = nullptr};
  const CaseResult one = run(in), many = run(in, false, threads);
  EXPECT_EQ(one.kl, many.kl);
  EXPECT_EQ(one.dq, many.dq);
}

TEST(TopKKl, IgnoredAndUnweightedRowsMayHoldAnything) {
  for (TailEstimate tail : kTails) {
    Case in = random_case(DType::float32, 3, 50, 4, 0.5);
    in.options.tail = tail;
    const CaseResult clean = run(in);
    in.targets[1] = -100;
    for (size_t v = 50; v < 100; ++v) in.q[v] = in.log_p[v] = kNan;
    in.ids[4] = -7;  // not looked at
    Views poisoned(random_case(DType::float32, 3, 50, 4, 0.5));
    for (size_t i = 4; i < 8; ++i) poisoned.head[i] = kNan;
    Memory q(in.dtype, in.q), dq(in.dtype, 150);
    const TopKHeads heads = poisoned.of(in, {q.words.data(), in.dtype, 3, 50, 50});
    std::vector<RowStatistics> statistics(3);
    Doubles kl(3);
    top_k_kl(heads, in.options, statistics.data(), kl.data());
    top_k_kl_gradients(heads, in.options, statistics.data(), in.upstream.data(),
                       {dq.words.data(), in.dtype, 3, 50, 50});
    EXPECT_EQ(kl, (Doubles{clean.kl[0], 0, clean.kl[2]}));
    const Doubles gradient = dq.values(150);
    for (size_t i = 0; i < 150; ++i) {
      ASSERT_EQ(gradient[i], i / 50 == 1 ? 0 : clean.dq[i]) << i;
    }
  }
}

TEST(TopKKl, BadInputIsRefused) {
  const Case good = random_case(DType::float32, 2, 30, 3, 0.5);
  const auto refusal = [](const Case& in, auto change) {
    const Views views(in);
    Memory q(in.dtype, in.q);
    TopKHeads heads = views.of(in, {q.words.data(), in.dtype, 2, 30, 30});
    change(heads);
    std::vector<RowStatistics> statistics(2);
    Doubles kl(2);
    return message([&] { top_k_kl(heads, in.options, statistics.data(), kl.data()); });
  };
  const auto nothing = [](TopKHeads&) {};
  EXPECT_EQ(refusal(good, nothing), "no error");
  Case in = good;
  in.ids[4] = in.ids[3];
  EXPECT_EQ(refusal(in, nothing), "top_k_kl: head_ids must be all different in a row, got " +
                                      text(in.ids[3]) + " again at [1, 1]");
  in = good;
  const auto with_id = [](int64_t id) {
    return [id](TopKHeads& heads) {
      static int64_t ids[6];
      std::copy_n(heads.ids, 6, ids);
      ids[5] = id;
      heads.ids = ids;
    };
  };
  EXPECT_EQ(refusal(in, with_id(30)), "top_k_kl: head_ids must be in [0, 30), got 30 at [1, 2]");
  EXPECT_EQ(refusal(in, with_id(-1)), "top_k_kl: head_ids must be in [0, 30), got -1 at [1, 2]");
  in.options.temperature = 0;
  EXPECT_EQ(refusal(in, nothing), "top_k_kl: temperature must be in [1e-06, 1e+06], got 0");
  in = good;
  EXPECT_EQ(refusal(in, [](TopKHeads& heads) { heads.targets = nullptr; }),
            "top_k_kl: targets and p_target_logps must be given for tail k1 and k3, got none");
  const int64_t bad[] = {3, 30};
  EXPECT_EQ(refusal(in, [&](TopKHeads& heads) { heads.targets = bad; }),
            "top_k_kl: targets must be in [0, 30) or ignore_index -100, got 30 at [1]");
  EXPECT_EQ(refusal(in, [](TopKHeads& heads) { heads.q.dtype = DType::boolean; }),
            "top_k_kl: q must be float32, float64, bfloat16 or float16, got boolean");
}

}  // namespace
}  // namespace tether
