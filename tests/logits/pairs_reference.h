#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "logits/pair_kl.h"
#include "tests/logits/rows_reference.h"

// Pairs of rows for the tests of logits/pair_kl.h, and the definition of its results in long
// double.

namespace tether::pairs_test {

using namespace rows_test;

struct Pairs {
  DType dtype = DType::float64;
  int64_t rows = 1, vocabulary = 0;
  Doubles q, p;
  double temperature = 1;
  std::vector<LogitsKl> upstream = {};
};

struct PairResult {
  Doubles kl, reverse_kl, entropy, dq, dp;
};

inline Pairs random_pairs(DType dtype, int64_t rows, int64_t vocabulary, double scale, double gap) {
  Pairs out{.dtype = dtype,
            .rows = rows,
            .vocabulary = vocabulary,
            .q = normal(rows * vocabulary, scale, 1),
            .p = normal(rows * vocabulary, gap, 2)};
  for (size_t i = 0; i < out.q.size(); ++i) out.p[i] += out.q[i];
  const Doubles upstream = normal(3 * rows, 1, 3);
  for (size_t i = 0; i < upstream.size(); i += 3) {
    out.upstream.push_back({upstream[i], upstream[i + 1], upstream[i + 2]});
  }
  return out;
}

// Three, of which either reference moves up while they are read.
inline Pairs ramped_pairs(DType dtype, int64_t vocabulary) {
  Pairs out = random_pairs(dtype, 3, vocabulary, 1, 0.5);
  const auto size = static_cast<size_t>(vocabulary);
  for (size_t i = 0; i < size; ++i) {
    const double ramp = 60.0 * static_cast<double>(i) / static_cast<double>(size);
    out.q[i] += ramp;
    out.p[size + i] += ramp;
    out.q[2 * size + i] += ramp;
    out.p[2 * size + i] -= ramp;
  }
  return out;
}

inline ConstLogits view(const Pairs& in, Memory& memory) {
  return {memory.words.data(), memory.dtype, in.rows, in.vocabulary, in.vocabulary};
}
inline MutableLogits out_view(const Pairs& in, Memory& memory) {
  return {memory.words.data(), memory.dtype, in.rows, in.vocabulary, in.vocabulary};
}

inline PairResult run(const Pairs& in, bool in_place = false) {
  Memory q(in.dtype, in.q), p(in.dtype, in.p);
  Memory dq(in.dtype, in.rows * in.vocabulary), dp = dq;
  std::vector<KlStatistics> statistics(static_cast<size_t>(in.rows));
  logits_kl_statistics(view(in, q), view(in, p), in.temperature, nullptr, statistics.data());
  PairResult out;
  for (const KlStatistics& row : statistics) {
    const LogitsKl value = logits_kl(row);
    out.kl.push_back(value.kl);
    out.reverse_kl.push_back(value.reverse_kl);
    out.entropy.push_back(value.entropy);
  }
  Memory& q_out = in_place ? q : dq;
  Memory& p_out = in_place ? p : dp;
  logits_kl_gradients(view(in, q), view(in, p), in.temperature, statistics.data(),
                      in.upstream.data(), out_view(in, q_out), out_view(in, p_out));
  out.dq = q_out.values(in.rows * in.vocabulary);
  out.dp = p_out.values(in.rows * in.vocabulary);
  return out;
}

// Column by column in long double, of the logits as they are stored.
inline PairResult definition(const Pairs& in) {
  Memory q_memory(in.dtype, in.q), p_memory(in.dtype, in.p);
  const auto size = static_cast<size_t>(in.vocabulary);
  const auto log_softmax = [&](Memory& memory, size_t row) {
    std::vector<long double> x;
    for (size_t v = 0; v < size; ++v) x.push_back(memory.get(row * size + v) / in.temperature);
    const long double max = *std::max_element(x.begin(), x.end());
    long double sum = 0;
    for (long double each : x) sum += std::exp(each - max);
    for (long double& each : x) each -= max + std::log(sum);
    return x;
  };
  const auto product = [](long double p, long double what) { return p > 0 ? p * what : 0; };
  PairResult out;
  for (size_t row = 0; row < static_cast<size_t>(in.rows); ++row) {
    const auto log_q = log_softmax(q_memory, row), log_p = log_softmax(p_memory, row);
    long double kl = 0, reverse_kl = 0, entropy = 0;
    for (size_t v = 0; v < size; ++v) {
      kl += product(std::exp(log_q[v]), log_q[v] - log_p[v]);
      reverse_kl += product(std::exp(log_p[v]), log_p[v] - log_q[v]);
      entropy -= product(std::exp(log_q[v]), log_q[v]);
    }
    out.kl.push_back(static_cast<double>(kl));
    out.reverse_kl.push_back(static_cast<double>(reverse_kl));
    out.entropy.push_back(static_cast<double>(entropy));
    const LogitsKl& up = in.upstream[row];
    for (size_t v = 0; v < size; ++v) {
      const long double q = std::exp(log_q[v]), p = std::exp(log_p[v]), gap = log_q[v] - log_p[v];
      const auto times = [](double u, long double what) { return u == 0 ? 0 : u * what; };
      const long double dq = times(up.kl, product(q, gap - kl)) + up.reverse_kl * (q - p) -
                             up.entropy * product(q, log_q[v] + entropy);
      const long double dp = up.kl * (p - q) + times(up.reverse_kl, product(p, -gap - reverse_kl));
      out.dq.push_back(static_cast<double>(dq / in.temperature));
      out.dp.push_back(static_cast<double>(dp / in.temperature));
    }
  }
  return out;
}

inline void expect_close(const PairResult& got, const PairResult& want, const Pairs& in) {
  const double ulp = in.dtype == DType::float64 ? 0x1p-52 : 0x1p-23;
  const double size =
      std::max({1.0, largest(in.q) / in.temperature, largest(in.p) / in.temperature});
  expect_near(got.kl, want.kl, 16 * ulp * size, name(in.dtype, in.vocabulary) + " kl");
  expect_near(got.reverse_kl, want.reverse_kl, 16 * ulp * size, "reverse");
  expect_near(got.entropy, want.entropy, 16 * ulp * size, "entropy");
  const double bound = 32 * ulp * size * 3 * std::max(1.0, 1 / in.temperature);
  for (size_t i = 0; i < want.dq.size(); ++i) {
    ASSERT_NEAR(got.dq[i], want.dq[i], bound + rounding(in.dtype, want.dq[i])) << i;
    ASSERT_NEAR(got.dp[i], want.dp[i], bound + rounding(in.dtype, want.dp[i])) << i;
  }
}

// Columns of probability 1, 2^-111 (in gradients 0 but in float64) and 0 in one row; the other
// lacks the first.
template <class Run>
void expect_no_slopes_of_infinite(Run run, DType dtype) {
  Pairs in{.dtype = dtype,
           .vocabulary = 3,
           .q = {49, -28, -infinity},
           .p = {-infinity, 9, -infinity},
           .upstream = {{1, 0, 0}}};
  const auto expect = [dtype](const Doubles& gradients) {
    EXPECT_TRUE(std::isnan(gradients[0]));
    EXPECT_EQ(std::isnan(gradients[1]), dtype == DType::float64);
    EXPECT_EQ(gradients[2], 0);
  };
  expect(run(in).dq);
  std::swap(in.q, in.p);
  in.upstream = {{0, 1, 0}};
  expect(run(in).dp);
}

}  // namespace tether::pairs_test
