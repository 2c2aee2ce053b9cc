#include "logits/pair_kl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "estimators/kl/exact.h"
#include "tests/error_message.h"
#include "tests/logits/pairs_reference.h"

namespace tether {
namespace {

using namespace pairs_test;

TEST(LogitsKl, MatchesTheDefinition) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {1, 2, 31, 33, 2048, 5000}) {
      for (double gap : {0.05, 1.0, 6.0}) {
        Pairs in = random_pairs(dtype, 3, vocabulary, 4, gap);
        in.temperature = 0.8;
        expect_close(run(in), definition(in), in);
      }
    }
  }
}

TEST(LogitsKl, MatchesTheDefinitionWhereTheReferencesMove) {
  for (DType dtype : kAllTypes) {
    const Pairs in = ramped_pairs(dtype, 7000);
    expect_close(run(in), definition(in), in);
  }
}

TEST(LogitsKl, MatchesTheExactKlOfLogProbabilities) {
  const Pairs in = random_pairs(DType::float64, 1, 50, 2, 1);
  const auto log_softmax = [](Doubles x) {
    double sum = 0;
    for (double each : x) sum += std::exp(each);
    for (double& each : x) each -= std::log(sum);
    return x;
  };
  const Doubles log_q = log_softmax(in.q), log_p = log_softmax(in.p);
  const PairResult got = run(in);
  EXPECT_NEAR(got.kl[0], categorical_kl(log_q.data(), log_p.data(), 50), 1e-14);
  EXPECT_NEAR(got.reverse_kl[0], categorical_kl(log_p.data(), log_q.data(), 50), 1e-14);
}

TEST(LogitsKl, GradientIsTheDerivativeOfValue) {
  const Pairs in = random_pairs(DType::float64, 2, 23, 2, 1);
  const PairResult gradient = run(in);
  const auto objective = [&](const Pairs& at) {
    const PairResult value = run(at);
    double sum = 0;
    for (size_t row = 0; row < 2; ++row) {
      const LogitsKl& up = in.upstream[row];
      sum += up.kl * value.kl[row] + up.reverse_kl * value.reverse_kl[row] +
             up.entropy * value.entropy[row];
    }
    return sum;
  };
  const double step = 1e-5;
  for (size_t i = 0; i < in.q.size(); ++i) {
    for (bool of_q : {true, false}) {
      Pairs up = in, down = in;
      (of_q ? up.q : up.p)[i] += step;
      (of_q ? down.q : down.p)[i] -= step;
      const double want = (objective(up) - objective(down)) / (2 * step);
      EXPECT_NEAR((of_q ? gradient.dq : gradient.dp)[i], want, 1e-9) << i;
    }
  }
}

TEST(LogitsKl, GradientInPlaceAndOfOneRowAlone) {
  for (DType dtype : kAllTypes) {
    const Pairs in = random_pairs(dtype, 3, 2500, 3, 1);
    const PairResult want = run(in), got = run(in, true);
    EXPECT_EQ(got.dq, want.dq);
    EXPECT_EQ(got.dp, want.dp);
    Memory q(dtype, in.q), p(dtype, in.p), out(dtype, 3 * 2500);
    std::vector<KlStatistics> statistics(3);
    logits_kl_statistics(view(in, q), view(in, p), 1, nullptr, statistics.data());
    logits_kl_gradients(view(in, q), view(in, p), 1, statistics.data(), in.upstream.data(),
                        out_view(in, out), {});
    const auto expect_like = [&](const Doubles& whole) {  // products are contracted otherwise
      const Doubles values = out.values(3 * 2500);
      for (size_t i = 0; i < values.size(); ++i) {
        ASSERT_NEAR(values[i], whole[i],
                    2e-6 * std::abs(whole[i]) + 2 * rounding(dtype, whole[i]) +
                        (dtype == DType::float64 ? 1e-16 : 1e-9));
      }
    };
    expect_like(want.dq);
    logits_kl_gradients(view(in, q), view(in, p), 1, statistics.data(), in.upstream.data(), {},
                        out_view(in, out));
    expect_like(want.dp);
  }
}

// What one column has more than half of: its own terms cancel, those of the others do not.
TEST(LogitsKl, ConfidentColumnsKeepTheDigitsOfTheirGradients) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {2, 33, 2048, 7000}) {
      for (int64_t column : {int64_t{0}, vocabulary / 2, vocabulary - 1}) {
        for (double distance : {1.0, 12.0, 20.0, 30.0}) {
          for (const LogitsKl& upstream : {LogitsKl{1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {2, -1, 3}}) {
            Pairs in = random_pairs(dtype, 1, vocabulary, 0.5, 0.5);
            const double above = distance + std::log(static_cast<double>(vocabulary));
            in.q[static_cast<size_t>(column)] = in.p[static_cast<size_t>(column)] = above;
            in.upstream = {upstream};
            const PairResult got = run(in), in_place = run(in, true), want = definition(in);
            for (auto side : {&PairResult::dq, &PairResult::dp}) {
              long double others = 0;
              double mass = 0;  // of the others in both rows
              for (size_t v = 0; v < static_cast<size_t>(vocabulary); ++v) {
                if (v == static_cast<size_t>(column)) continue;
                others += (want.*side)[v];
                mass += std::exp(in.q[v] - above) + std::exp(in.p[v] - above);
              }
              const double gradient = (got.*side)[static_cast<size_t>(column)];
              const double ulp = dtype == DType::float64 ? 0x1p-52 : 0x1p-23;
              const double bound =
                  64 * ulp * mass * (2 + above) + rounding(dtype, static_cast<double>(others));
              ASSERT_NEAR(gradient, static_cast<double>(-others), bound)
                  << name(dtype, vocabulary) << ", column " << column << ", distance " << distance;
              ASSERT_EQ((in_place.*side)[static_cast<size_t>(column)], gradient);
            }
          }
        }
      }
    }
  }
}

TEST(LogitsKl, EqualRowsHaveNone) {
  for (DType dtype : kAllTypes) {
    Pairs in = random_pairs(dtype, 2, 3000, 5, 0);
    in.p = in.q;
    const PairResult got = run(in);
    for (size_t row = 0; row < 2; ++row) {
      EXPECT_EQ(got.kl[row], 0);
      EXPECT_EQ(got.reverse_kl[row], 0);
    }
  }
}

// Far below the rounding of the log-probabilities, which is 1e-7 and more.
TEST(LogitsKl, NearlyEqualRowsKeepTheDigitsOfTheirDivergence) {
  for (DType dtype : {DType::float32, DType::float64}) {
    for (double gap : {1e-2, 1e-3, 1e-4}) {
      for (double constant : {0.0, 3.0}) {
        const double near = dtype == DType::float64 ? 1e-2 * gap : gap;
        Pairs in = random_pairs(dtype, 3, 5000, 2, near);
        for (double& each : in.p) each += constant;
        in.temperature = 0.7;
        in.p[7] = in.q[7] = -infinity;
        in.q[4999] = in.p[4999] = 12;  // a confident row
        const PairResult got = run(in), want = definition(in);
        for (size_t row = 0; row < 3; ++row) {
          EXPECT_NEAR(got.kl[row] / want.kl[row], 1, 2e-3) << gap << " " << row;
          EXPECT_NEAR(got.reverse_kl[row] / want.reverse_kl[row], 1, 2e-3) << gap << " " << row;
        }
      }
    }
  }
}

// The two directions differ by 1%: one column of ten is more likely in p.
TEST(LogitsKl, NearlyEqualRowsKnowTheDirection) {
  Pairs in = random_pairs(DType::float32, 2, 3000, 1, 0);
  for (size_t v = 0; v < in.p.size(); v += 10) in.p[v] += 0.06;
  const PairResult got = run(in), want = definition(in);
  for (size_t row = 0; row < 2; ++row) {
    EXPECT_LT(want.kl[row], 9e-4);
    EXPECT_NEAR(got.kl[row] / want.kl[row], 1, 1e-4);
    EXPECT_NEAR(got.reverse_kl[row] / want.reverse_kl[row], 1, 1e-4);
    EXPECT_GT(std::abs(want.kl[row] / want.reverse_kl[row] - 1), 0.005);
  }
}

TEST(LogitsKl, MinusInfinityInBothIsADeletedColumn) {
  for (DType dtype : kAllTypes) {
    const Pairs without = random_pairs(dtype, 1, 3000, 2, 1);
    Pairs with = without;
    with.vocabulary = 2 * 3000 + 40;
    with.q = with.p = Doubles(static_cast<size_t>(with.vocabulary), -infinity);
    for (size_t v = 0; v < 3000; ++v) {
      with.q[40 + 2 * v] = without.q[v];
      with.p[40 + 2 * v] = without.p[v];
    }
    const PairResult want = run(without), got = run(with);
    const double bound = dtype == DType::float64 ? 1e-14 : 4e-6;
    EXPECT_NEAR(got.kl[0], want.kl[0], bound);
    EXPECT_NEAR(got.reverse_kl[0], want.reverse_kl[0], bound);
    EXPECT_NEAR(got.entropy[0], want.entropy[0], bound);
    for (size_t v = 0; v < static_cast<size_t>(with.vocabulary); ++v) {
      const bool absent = v < 40 || v % 2 == 1;
      if (absent) {
        ASSERT_EQ(got.dq[v], 0);
        ASSERT_EQ(got.dp[v], 0);
      } else {
        const double dq = want.dq[(v - 40) / 2];
        ASSERT_NEAR(got.dq[v], dq, 4 * bound + 2 * rounding(dtype, dq));
      }
    }
  }
}

TEST(LogitsKl, MassWhereTheOtherHasNoneIsInfinite) {
  for (DType dtype : kAllTypes) {
    Pairs in = random_pairs(dtype, 2, 300, 1, 1);
    in.p[7] = -infinity;  // q has mass there: KL(q || p) is infinite, KL(p || q) is not
    const PairResult got = run(in), want = definition(in);
    EXPECT_EQ(got.kl[0], infinity);
    EXPECT_NEAR(got.reverse_kl[0], want.reverse_kl[0], 1e-5);
    EXPECT_NEAR(got.kl[1], want.kl[1], 1e-5);
  }
}

// A probability that is 0 in p is nothing beside -inf in q, wherever it stands in the row.
TEST(LogitsKl, ShuffledColumnsAreTheSameRows) {
  std::mt19937 generator(6);
  for (DType dtype : kAllTypes) {
    const double much = dtype == DType::float16 ? 6e4 : 1e30;
    for (const Doubles& values : {Doubles{-infinity, -1e4},
                                  {-1e4, -infinity},
                                  {-much, -infinity},
                                  {-1e4, -much},
                                  {-much, much},
                                  {-infinity, -infinity}}) {
      // Columns of `values` in both rows, and five others.
      Pairs in{.dtype = dtype,
               .vocabulary = 5000,
               .q = Doubles(5000, values[0]),
               .p = Doubles(5000, values[1]),
               .upstream = {{1, 1, 1}}};
      for (size_t v = 0; v < 5; ++v) {
        in.q[100 + 900 * v] = static_cast<double>(v) / 4;
        in.p[100 + 900 * v] = 1 - static_cast<double>(v) / 2;
      }
      std::vector<size_t> order(5000);
      std::iota(order.begin(), order.end(), size_t{0});
      const PairResult want = run(in);
      for (int shuffle = 0; shuffle < 5; ++shuffle) {
        std::shuffle(order.begin(), order.end(), generator);
        Pairs shuffled = in;
        for (size_t v = 0; v < 5000; ++v) {
          shuffled.q[v] = in.q[order[v]];
          shuffled.p[v] = in.p[order[v]];
        }
        const PairResult got = run(shuffled);
        EXPECT_FALSE(std::isnan(got.kl[0]) || std::isnan(got.reverse_kl[0]));
        for (auto value : {&PairResult::kl, &PairResult::reverse_kl, &PairResult::entropy}) {
          const double one = (got.*value)[0], other = (want.*value)[0];
          EXPECT_TRUE(one == other || std::abs(one - other) <= 1e-5 * std::abs(other))
              << one << " and " << other << " of " << values[0] << ", " << values[1];
        }
        // Where the divergence is 1e30, the gradient is its rounding.
        const double bound = 1e-5 * largest(want.dq) + 1e-6 * want.kl[0];
        for (size_t v = 0; v < 5000; ++v) {
          const double one = got.dq[v], other = want.dq[order[v]];
          ASSERT_TRUE(one == other || std::abs(one - other) <= bound) << one;
        }
      }
    }
  }
}

// Whole blocks that are not there in one row, less than 2^-100 of the other.
TEST(LogitsKl, MaskedBlocksAgainstVeryUnlikelyOnes) {
  for (DType dtype : kAllTypes) {
    const Pairs without = random_pairs(dtype, 1, 3000, 2, 1);
    for (double unlikely : {-80.0, -90.0}) {
      Pairs in = without;
      in.vocabulary = 9000;
      in.q.insert(in.q.begin(), 6000, -infinity);
      in.p.insert(in.p.begin(), 6000, unlikely);
      for (bool swapped : {false, true}) {
        const PairResult got = run(in), want = run(without);
        EXPECT_NEAR(got.kl[0], swapped ? want.reverse_kl[0] : want.kl[0], 4e-6);
        EXPECT_NEAR(got.reverse_kl[0], swapped ? want.kl[0] : want.reverse_kl[0], 4e-6);
        std::swap(in.q, in.p);
      }
    }
  }
}

TEST(LogitsKl, MaskedColumnsAgainstVeryUnlikelyOnes) {
  for (DType dtype : kAllTypes) {
    const Pairs without = random_pairs(dtype, 1, 3000, 2, 1);
    Pairs with = without;
    with.vocabulary = 6000;
    with.q.resize(6000, -infinity);
    with.p.resize(6000, -1e4);
    std::rotate(with.q.begin(), with.q.begin() + 3000, with.q.end());
    std::rotate(with.p.begin(), with.p.begin() + 3000, with.p.end());
    const PairResult want = run(without), got = run(with);
    EXPECT_NEAR(got.kl[0], want.kl[0], 4e-6);
    EXPECT_NEAR(got.reverse_kl[0], want.reverse_kl[0], 4e-6);
    for (size_t v = 0; v < 6000; ++v) {
      const double dq = v < 3000 ? 0 : want.dq[v - 3000];
      ASSERT_NEAR(got.dq[v], dq, 2e-6 + 2 * rounding(dtype, dq)) << v;
    }
  }
}

// The direction that is infinite does not spoil the gradient of the other.
TEST(LogitsKl, GradientOfTheFiniteDirection) {
  for (DType dtype : kAllTypes) {
    Pairs in = random_pairs(dtype, 1, 300, 1, 1);
    in.p[7] = -infinity;
    in.upstream[0] = {0, 1, 1};
    const PairResult got = run(in), want = definition(in);
    for (size_t v = 0; v < 300; ++v) {
      ASSERT_NEAR(got.dq[v], want.dq[v], 1e-5 + rounding(dtype, want.dq[v])) << v;
      ASSERT_NEAR(got.dp[v], want.dp[v], 1e-5 + rounding(dtype, want.dp[v])) << v;
    }
    in.upstream[0] = {1, 0, 0};
    EXPECT_TRUE(std::isnan(run(in).dq[7]));
  }
}

TEST(LogitsKl, MergedShardsOfMaskedColumns) {
  for (double floor : {-1e4, -50.0}) {  // of p where q is -inf, alone in the first shard
    const Doubles q = {-infinity, -infinity, 0, 1}, p = {floor, floor, 1, 0};
    KlStatistics merged;
    for (size_t begin : {size_t{0}, size_t{2}}) {
      KlStatistics part;
      logits_kl_statistics({q.data() + begin, DType::float64, 1, 2},
                           {p.data() + begin, DType::float64, 1, 2}, 1, nullptr, &part);
      merged = merge(part, merged, 1);
    }
    const double p_2 = 1 / (1 + std::exp(-1.0));
    EXPECT_NEAR(logits_kl(merged).kl, (1 - p_2) * -1 + p_2, 1e-12);
    if (floor == -50) {
      EXPECT_EQ(logits_kl(merged).reverse_kl, infinity);
    } else {
      EXPECT_NEAR(logits_kl(merged).reverse_kl, p_2 - (1 - p_2), 1e-12);
    }
  }
}

TEST(LogitsKl, FiniteLogitsGiveNoNan) {
  std::mt19937 generator(7);
  for (DType dtype : kAllTypes) {
    const double most = dtype == DType::float16   ? 65504
                        : dtype == DType::float64 ? std::numeric_limits<double>::max()
                                                  : 0x1.FEp127;
    const double values[] = {most, -most, most / 1e4, -most / 1e8, 0, 1, -100};
    for (double temperature : {1e-6, 1.0, 1e6}) {
      for (int64_t kinds : {2, 3, 7}) {
        Pairs in{.dtype = dtype,
                 .rows = 8,
                 .vocabulary = 2500,
                 .q = Doubles(20000),
                 .p = Doubles(20000),
                 .temperature = temperature};
        in.upstream.assign(8, {1, -1, 1});
        for (double& x : in.q) x = values[generator() % static_cast<uint64_t>(kinds)];
        for (double& y : in.p) y = values[generator() % static_cast<uint64_t>(kinds)];
        std::fill(in.p.begin(), in.p.begin() + 2500, most);
        std::fill(in.p.begin() + 2500, in.p.begin() + 5000, -most);
        const PairResult got = run(in);
        for (size_t row = 0; row < 8; ++row) {
          ASSERT_GE(got.kl[row], 0) << name(dtype, 2500) << ", T " << temperature;
          ASSERT_GE(got.reverse_kl[row], 0);
          ASSERT_GE(got.entropy[row], 0);
        }
        for (double each : got.dq) ASSERT_FALSE(std::isnan(each)) << name(dtype, 2500);
        for (double each : got.dp) ASSERT_FALSE(std::isnan(each)) << name(dtype, 2500);
      }
    }
  }
}

// The sizes between the ends of the type, too, where a factor of the gradients is beyond its range.
TEST(LogitsKl, FiniteLogitsOfAnySizeGiveNoNan) {
  std::mt19937 generator(8);
  for (DType dtype : kAllTypes) {
    const double most = dtype == DType::float16   ? 65504
                        : dtype == DType::float64 ? std::numeric_limits<double>::max()
                                                  : 0x1.FEp127;
    for (double power = 1.0 / 32; power <= 1; power += 1.0 / 32) {
      const double size = std::pow(most, power);
      for (double temperature : {1e-6, 1.0, 1e6}) {
        for (double upstream : {1e-30, 1.0, 1e30, most}) {
          Pairs in{.dtype = dtype,
                   .rows = 4,
                   .vocabulary = 40,
                   .q = Doubles(160),
                   .p = Doubles(160),
                   .temperature = temperature};
          in.upstream = {{upstream, 0, 0}, {0, upstream, 0}, {0, 0, upstream}, {}};
          in.upstream[3] = {upstream, -upstream, upstream};
          for (Doubles* row : {&in.q, &in.p}) {
            for (double& x : *row) x = size * (static_cast<double>(generator() % 3) - 1);
          }
          const PairResult got = run(in);
          const std::string what = name(dtype, 40) + ", size " + std::to_string(size) + ", T " +
                                   std::to_string(temperature) + ", upstream " +
                                   std::to_string(upstream);
          for (size_t row = 0; row < 4; ++row) {
            ASSERT_GE(got.kl[row], 0) << what;
            ASSERT_GE(got.reverse_kl[row], 0) << what;
            ASSERT_GE(got.entropy[row], 0) << what;
          }
          for (double each : got.dq) ASSERT_FALSE(std::isnan(each)) << what;
          for (double each : got.dp) ASSERT_FALSE(std::isnan(each)) << what;
        }
      }
    }
  }
}

// p = 0 exactly: no upstream gradient makes anything of it.
TEST(LogitsKl, AbsentColumnsHaveNoGradientUnderAnInfiniteOne) {
  for (DType dtype : kAllTypes) {
    Pairs in = random_pairs(dtype, 4, 3000, 1, 1);
    in.upstream = {{infinity, 0, 0}, {0, infinity, 0}, {0, 0, infinity}, {1, -infinity, infinity}};
    for (size_t row = 0; row < 4; ++row) {
      for (size_t v = row; v < 3000; v += 7)
        in.q[row * 3000 + v] = in.p[row * 3000 + v] = -infinity;
    }
    const PairResult got = run(in);
    for (size_t i = 0; i < in.q.size(); ++i) {
      if (in.q[i] == -infinity) {
        ASSERT_EQ(got.dq[i], 0) << name(dtype, 3000) << " " << i;
        ASSERT_EQ(got.dp[i], 0) << name(dtype, 3000) << " " << i;
      }
    }
    for (size_t row = 0; row < 4; ++row) EXPECT_FALSE(std::isfinite(got.dq[row * 3000 + 4]));
  }
}

// A column at -inf in one row alone adds nothing where the other has less than 2^-100.
TEST(LogitsKl, AlmostAbsentColumnsBesideAbsentOnesHaveAlmostNoGradient) {
  for (double logit : {-70.1, -200.0, -600.0}) {
    Pairs in{.vocabulary = 3, .q = {0, 1, logit}, .p = {1, 0, -infinity}, .upstream = {{1, 1, 1}}};
    for (bool swapped : {false, true}) {
      const PairResult got = run(in);
      for (double each : {got.dq[2], got.dp[2]}) EXPECT_LE(std::abs(each), 1e-25) << logit;
      EXPECT_TRUE(std::isfinite(got.kl[0]) && std::isfinite(got.reverse_kl[0])) << swapped;
      std::swap(in.q, in.p);
    }
  }
}

TEST(LogitsKl, AnInfiniteDivergenceHasNoGradientWhereThereIsAProbability) {
  for (DType dtype : kAllTypes) {
    expect_no_slopes_of_infinite([](const Pairs& in) { return run(in); }, dtype);
  }
}

TEST(LogitsKl, NoGradientIsSubnormal) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
    const double least = dtype == DType::float64 ? 0x1p-1022 : 0x1p-126;
    for (double upstream : {1e-6, 1.0, 1e6}) {
      Pairs in = random_pairs(dtype, 4, 3000, dtype == DType::float64 ? 150 : 18, 0.3);
      for (LogitsKl& each : in.upstream) {
        each = {each.kl * upstream, each.reverse_kl * upstream, each.entropy * upstream};
      }
      const PairResult got = run(in);
      for (const Doubles& gradient : {got.dq, got.dp}) {
        for (double each : gradient) ASSERT_TRUE(each == 0 || std::abs(each) >= least) << each;
        EXPECT_GT(std::count(gradient.begin(), gradient.end(), 0.0), 10);
      }
    }
  }
}

TEST(LogitsKl, BadRowsAreNanAndTheirNeighboursAreNot) {
  for (double poison : {kNan, infinity}) {
    Pairs in = random_pairs(DType::float32, 2, 300, 1, 1);
    in.p[7] = poison;
    const PairResult got = run(in), want = definition(in);
    EXPECT_TRUE(std::isnan(got.kl[0]) && std::isnan(got.reverse_kl[0]));
    EXPECT_NEAR(got.kl[1], want.kl[1], 1e-5);
  }
}

TEST(LogitsKl, InactiveRowsMayHoldAnything) {
  Pairs in = random_pairs(DType::float32, 2, 300, 1, 1);
  std::fill(in.q.begin(), in.q.begin() + 300, kNan);
  Memory q(in.dtype, in.q), p(in.dtype, in.p), dq(in.dtype, 600);
  const uint8_t active[] = {0, 1};
  std::vector<KlStatistics> statistics(2);
  logits_kl_statistics(view(in, q), view(in, p), 1, active, statistics.data());
  EXPECT_EQ(logits_kl(statistics[0]).kl, 0);
  EXPECT_EQ(logits_kl(statistics[0]).entropy, 0);
  EXPECT_GT(logits_kl(statistics[1]).kl, 0);
  in.upstream[0] = {};
  logits_kl_gradients(view(in, q), view(in, p), 1, statistics.data(), in.upstream.data(),
                      out_view(in, dq), {});
  const Doubles gradient = dq.values(300);
  EXPECT_EQ(gradient, Doubles(300, 0.0));
}

TEST(LogitsKl, MergedShardsAreTheWhole) {
  const Pairs in = random_pairs(DType::float64, 1, 900, 10, 2);
  Memory q(in.dtype, in.q), p(in.dtype, in.p);
  const PairResult want = run(in);
  for (int64_t shards : {2, 3, 4}) {
    KlStatistics merged;
    for (int64_t shard = 0; shard < shards; ++shard) {
      const int64_t begin = 900 * shard / shards, end = 900 * (shard + 1) / shards;
      KlStatistics part;
      logits_kl_statistics({q.words.data() + begin, in.dtype, 1, end - begin},
                           {p.words.data() + begin, in.dtype, 1, end - begin}, 1, nullptr, &part);
      merged = shard % 2 == 0 ? merge(merged, part, 1) : merge(part, merged, 1);
    }
    EXPECT_NEAR(logits_kl(merged).kl, want.kl[0], 1e-13);
    EXPECT_NEAR(logits_kl(merged).reverse_kl, want.reverse_kl[0], 1e-13);
    EXPECT_NEAR(logits_kl(merged).entropy, want.entropy[0], 1e-13);
  }
}

TEST(LogitsKl, BadInputIsRefused) {
  Pairs in = random_pairs(DType::float32, 2, 30, 1, 1);
  Memory q(in.dtype, in.q), p(in.dtype, in.p);
  std::vector<KlStatistics> statistics(2);
  const auto refusal = [&](ConstLogits left, ConstLogits right, double temperature = 1) {
    return message(
        [&] { logits_kl_statistics(left, right, temperature, nullptr, statistics.data()); });
  };
  const ConstLogits x = view(in, q), y = view(in, p);
  EXPECT_EQ(refusal(x, y), "no error");
  ConstLogits bad = y;
  bad.rows = 3;
  EXPECT_EQ(refusal(x, bad),
            "logits_kl_statistics: p must be [2, 30] of the type of q, got [3, 30]");
  bad = y;
  bad.dtype = DType::float64;
  EXPECT_EQ(
      refusal(x, bad),
      "logits_kl_statistics: p must be [2, 30] of the type of q, got [2, 30] of another type");
  EXPECT_EQ(refusal(x, y, 0), "logits_kl_statistics: temperature must be in [1e-06, 1e+06], got 0");
}

}  // namespace
}  // namespace tether
