// Divergences of logits/support.h.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "logits/pair_kl.h"
#include "logits/support.h"
#include "tests/error_message.h"
#include "tests/logits/support_batch.h"

namespace tether {
namespace {

using namespace rows_test;

struct Pair {
  Batch q;
  Doubles p;
  SupportKlOptions options = {};
  std::vector<LogitsKl> upstream = {};
};

struct PairResult {
  std::vector<LogitsKl> values;
  Doubles dq, dp;
};

Pair random_pair(DType dtype, int64_t rows, int64_t vocabulary) {
  Pair out{.q = random_batch(dtype, rows, vocabulary, 2),
           .p = normal(rows * vocabulary, 1, 7),
           .options = {.temperature = 0.7}};
  for (size_t i = 0; i < out.p.size(); ++i) out.p[i] += out.q.logits[i];
  const Doubles upstream = normal(3 * rows, 1, 3);
  for (size_t i = 0; i < upstream.size(); i += 3) {
    out.upstream.push_back({upstream[i], upstream[i + 1], upstream[i + 2]});
  }
  return out;
}

PairResult run(const Pair& in, const KeptIds& kept, const Executor& executor = {}) {
  Memory q(in.q.dtype, in.q.logits), p(in.q.dtype, in.p);
  Memory dq(in.q.dtype, Doubles(in.p.size(), kNan)), dp = dq;
  const int64_t rows = in.q.rows(), vocabulary = in.q.vocabulary;
  const int64_t* targets = in.q.targets.data();
  std::vector<KlStatistics> statistics(in.q.targets.size());
  support_kl_statistics(in.q.view(q), in.q.view(p), targets, kept, in.options, statistics.data(),
                        executor);
  PairResult out;
  for (const KlStatistics& row : statistics) out.values.push_back(logits_kl(row));
  const auto memory = [&](Memory& of) {
    return MutableLogits{of.words.data(), of.dtype, rows, vocabulary, vocabulary};
  };
  support_kl_gradients(in.q.view(q), in.q.view(p), targets, kept, in.options, statistics.data(),
                       in.upstream.data(), memory(dq), memory(dp), executor);
  out.dq = dq.values(rows * vocabulary);
  out.dp = dp.values(rows * vocabulary);
  return out;
}

PairResult run(const Pair& in, const Sets& sets, const Executor& executor = {}) {
  Kept kept;
  pad(sets, kept);
  return run(in, kept.view, executor);
}

void expect_same(const PairResult& got, const PairResult& want) {
  for (size_t row = 0; row < want.values.size(); ++row) {
    EXPECT_EQ(got.values[row].kl, want.values[row].kl);
    EXPECT_EQ(got.values[row].reverse_kl, want.values[row].reverse_kl);
    EXPECT_EQ(got.values[row].entropy, want.values[row].entropy);
  }
  EXPECT_EQ(got.dq, want.dq);
  EXPECT_EQ(got.dp, want.dp);
}

// Of the columns that count, in long double.
LogitsKl definition(const Pair& in, const std::vector<bool>& counts, size_t row) {
  Memory q(in.q.dtype, in.q.logits), p(in.q.dtype, in.p);
  const auto log_softmax = [&](Memory& memory) {
    std::vector<long double> x;
    long double sum = 0;
    for (size_t v = 0; v < counts.size(); ++v) {
      if (!counts[v]) continue;
      x.push_back(memory.get(row * counts.size() + v) / in.options.temperature);
      sum += std::exp(x.back());
    }
    for (long double& each : x) each -= std::log(sum);
    return x;
  };
  const auto log_q = log_softmax(q), log_p = log_softmax(p);
  long double kl = 0, reverse_kl = 0, entropy = 0;
  for (size_t i = 0; i < log_q.size(); ++i) {
    kl += std::exp(log_q[i]) * (log_q[i] - log_p[i]);
    reverse_kl += std::exp(log_p[i]) * (log_p[i] - log_q[i]);
    entropy -= std::exp(log_q[i]) * log_q[i];
  }
  return {double(kl), double(reverse_kl), double(entropy)};
}

TEST(SupportKl, MatchesTheDefinition) {
  for (DType dtype : kAllTypes) {
    const Pair in = random_pair(dtype, 5, 900);
    const Sets sets = random_sets(in.q, 20);
    const PairResult got = run(in, sets);
    const double bound = dtype == DType::float64 ? 1e-13 : 1e-5;
    for (size_t row = 0; row < 5; ++row) {
      const LogitsKl want = definition(in, counted(in.q, sets, row), row);
      EXPECT_NEAR(got.values[row].kl, want.kl, bound) << row;
      EXPECT_NEAR(got.values[row].reverse_kl, want.reverse_kl, bound) << row;
      EXPECT_NEAR(got.values[row].entropy, want.entropy, bound) << row;
    }
  }
}

TEST(SupportKl, GradientsAreTheDerivativesOfTheValues) {
  const Pair in = random_pair(DType::float64, 4, 30);
  const Sets sets = random_sets(in.q, 6);
  const PairResult got = run(in, sets);
  const auto objective = [&](const Pair& at) {
    const PairResult result = run(at, sets);
    double sum = 0;
    for (size_t row = 0; row < 4; ++row) {
      const LogitsKl &a = in.upstream[row], &b = result.values[row];
      sum += a.kl * b.kl + a.reverse_kl * b.reverse_kl + a.entropy * b.entropy;
    }
    return sum;
  };
  const double step = 1e-5;
  const auto numerical = [&](size_t i, auto logits_of) {
    Pair up = in, down = in;
    logits_of(up)[i] += step;
    logits_of(down)[i] -= step;
    return (objective(up) - objective(down)) / (2 * step);
  };
  for (size_t i = 0; i < in.p.size(); ++i) {
    const auto of_q = [](Pair& pair) -> Doubles& { return pair.q.logits; };
    const auto of_p = [](Pair& pair) -> Doubles& { return pair.p; };
    EXPECT_NEAR(got.dq[i], numerical(i, of_q), 1e-8) << i;
    EXPECT_NEAR(got.dp[i], numerical(i, of_p), 1e-8) << i;
  }
}

TEST(SupportKl, AllIdsAndNoneAreTheWholeRowsToTheBit) {
  const Pair in = random_pair(DType::float32, 4, 3000);
  Memory q(in.q.dtype, in.q.logits), p(in.q.dtype, in.p);
  std::vector<KlStatistics> statistics(4);
  logits_kl_statistics(in.q.view(q), in.q.view(p), in.options.temperature, nullptr,
                       statistics.data());
  const PairResult all = run(in, random_sets(in.q, 3000)), none = run(in, Sets(4));
  for (size_t row = 0; row < 4; ++row) {
    EXPECT_EQ(all.values[row].kl, logits_kl(statistics[row]).kl);
    EXPECT_EQ(all.values[row].reverse_kl, logits_kl(statistics[row]).reverse_kl);
  }
  expect_same(all, none);
}

TEST(SupportKl, LayoutAndExecutorChangeNoBitAndNothingElseIsRead) {
  for (DType dtype : kAllTypes) {
    Pair in = random_pair(dtype, 6, 700);
    const Sets sets = random_sets(in.q, 20);
    const PairResult want = run(in, sets);
    Kept packed;
    pack(sets, packed);
    Batch other = in.q;
    other.logits = in.p;
    in.q = with_others(in.q, sets, kNan);
    in.p = with_others(other, sets, kNan).logits;
    expect_same(run(in, packed.view, backwards_on_threads()), want);
  }
}

TEST(SupportKl, AnIgnoredRowIsNothing) {
  Pair in = random_pair(DType::float64, 3, 20);
  in.q.targets = {in.options.ignore_index, in.options.ignore_index, 4};
  const Sets sets = {{-5, 100}, {3, 5}, {4}};
  for (size_t v = 0; v < 40; ++v) in.q.logits[v] = kNan;
  const PairResult got = run(in, sets);
  for (const size_t row : {0U, 1U}) {
    EXPECT_EQ(got.values[row].kl, 0);
    EXPECT_EQ(got.values[row].reverse_kl, 0);
    EXPECT_EQ(got.values[row].entropy, 0);
  }
  for (size_t v = 0; v < 40; ++v) EXPECT_EQ(got.dq[v], 0);
  for (size_t v = 0; v < 40; ++v) EXPECT_EQ(got.dp[v], 0);
}

TEST(SupportKl, ARowThatIsNotActiveIsNothing) {
  Pair in = random_pair(DType::float64, 3, 20);
  const Sets sets = {{1, 2}, {3, 5}, {4}};
  const PairResult all = run(in, sets);
  const uint8_t active[] = {1, 0, 1};
  in.options.active = active;
  for (size_t v = 20; v < 40; ++v) in.q.logits[v] = in.p[v] = kNan;
  const PairResult got = run(in, Sets{sets[0], {-7, 100}, sets[2]});
  EXPECT_EQ(got.values[0].kl, all.values[0].kl);
  EXPECT_EQ(got.values[1].kl, 0);
  EXPECT_EQ(got.values[1].entropy, 0);
  EXPECT_EQ(got.values[2].kl, all.values[2].kl);
  for (size_t v = 0; v < 60; ++v) {
    EXPECT_EQ(got.dq[v], v / 20 == 1 ? 0 : all.dq[v]);
    EXPECT_EQ(got.dp[v], v / 20 == 1 ? 0 : all.dp[v]);
  }
}

TEST(SupportKl, EitherGradientMayBeUnwanted) {
  const Pair in = random_pair(DType::float64, 4, 30);
  const Sets sets = random_sets(in.q, 6);
  const PairResult want = run(in, sets);
  Kept kept;
  pad(sets, kept);
  const int64_t* targets = in.q.targets.data();
  const ConstLogits q = {in.q.logits.data(), DType::float64, 4, 30, 30},
                    p = {in.p.data(), DType::float64, 4, 30, 30};
  std::vector<KlStatistics> statistics(4);
  support_kl_statistics(q, p, targets, kept.view, in.options, statistics.data());
  Doubles dq(120), dp(120);
  const auto memory = [](Doubles& of) {
    return MutableLogits{of.data(), DType::float64, 4, 30, 30};
  };
  support_kl_gradients(q, p, targets, kept.view, in.options, statistics.data(), in.upstream.data(),
                       memory(dq), {});
  support_kl_gradients(q, p, targets, kept.view, in.options, statistics.data(), in.upstream.data(),
                       {}, memory(dp));
  expect_near(dq, want.dq, 1e-15, "dq");
  expect_near(dp, want.dp, 1e-15, "dp");
}

TEST(SupportKl, ShardsMergeToTheWhole) {
  const Pair in = random_pair(DType::float64, 5, 40);
  Sets sets = random_sets(in.q, 7);
  sets[0] = {in.q.targets[0]};  // the other shard has none
  const PairResult want = run(in, sets);
  Kept kept;
  pack(sets, kept);
  const int64_t* targets = in.q.targets.data();
  std::vector<KlStatistics> rows(5), part(5);
  const auto shard = [&](const Doubles& of, int64_t begin, int64_t end) {
    return ConstLogits{of.data() + begin, DType::float64, 5, end - begin, 40};
  };
  for (const auto& [begin, end] : {std::pair{0, 15}, std::pair{15, 40}}) {
    SupportKlOptions options = in.options;
    options.first_id = begin;
    options.ids = 40;
    support_kl_statistics(shard(in.q.logits, begin, end), shard(in.p, begin, end), targets,
                          kept.view, options, part.data());
    for (size_t row = 0; row < 5; ++row) {
      rows[row] = begin == 0 ? part[row] : merge(rows[row], part[row], options.temperature);
    }
  }
  for (size_t row = 0; row < 5; ++row) {
    EXPECT_NEAR(logits_kl(rows[row]).kl, want.values[row].kl, 1e-13);
    EXPECT_NEAR(logits_kl(rows[row]).reverse_kl, want.values[row].reverse_kl, 1e-13);
    EXPECT_NEAR(logits_kl(rows[row]).entropy, want.values[row].entropy, 1e-13);
  }
}

TEST(SupportKl, RowsThatDifferAreRefused) {
  Pair in = random_pair(DType::float64, 1, 4);
  in.options.temperature = 0;
  EXPECT_EQ(message([&] { run(in, Sets{{1}}); }),
            "support_kl_statistics: temperature must be in [1e-06, 1e+06], got 0");
  in.options = {.first_id = 3, .ids = 6};
  EXPECT_EQ(message([&] { run(in, Sets{{1}}); }),
            "support_kl_statistics: first_id must be in [0, 2], got 3");
}

}  // namespace
}  // namespace tether
